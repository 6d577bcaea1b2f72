"""The tile-scaled cache (fp8_ds_mla): rows bit by bit against plain Python, and decode over them."""

import math
import struct
from functools import partial

import pytest
import torch
from plain_fp8 import LARGEST, SIZES, TILE, bits_of, float32_at, row_of, values_of
from test_kernel_fp8 import ROUNDED, check, geometry, kernels, problem_for

from mla_kernels import FORMATS, OPERATIONS, CacheLayout, Device, Problem, reference, select
from mla_kernels.cache_layout import PackedRow, packed_row
from mla_kernels.testing import make_decode

FORMAT = FORMATS["fp8_ds_mla"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(512, 64), (128, 0), (384, 32)]  # latent and rope


def problem_of(latent, rope, dtype, page_size=16):
    layout = CacheLayout(geometry=geometry(1, latent, rope), format=FORMAT, page_size=page_size)
    return Problem(layout=layout, dtype=dtype)


def test_plain_python_knows_the_row():
    """Numbers worked out by hand, and from vLLM's pull request 49435."""
    row = row_of(
        [0.0] * 128 + [336.0, -0.75] + [0.0] * 126 + [448.0] * 128 + [float32_at(0x43E00001)] * 128, [1.0] * 64
    )
    assert len(row) == 656
    assert struct.unpack("<4f", row[512:528]) == (2.0**-13, 1.0, 1.0, 2.0)
    assert (row[0], row[128], row[129], row[256], row[384]) == (0, 0x7A, 0xB4, 0x7E, 0x76)
    assert row[528:] == bytes([0x80, 0x3F]) * 64
    assert values_of(row, 512)[128:130] == [320.0, -0.75]


def rows_of(latent: int, rope: int) -> torch.Tensor:
    """Rows whose tiles hold every code, values between codes, all sizes, and what is special."""
    g = torch.Generator().manual_seed(0)
    width = latent + rope
    random = torch.randn(12, width, generator=g)
    sized = random * torch.logspace(-40, 38, 12)[:, None]
    sizes = torch.tensor(SIZES)
    codes = torch.cat([sizes, -sizes, (sizes[1:] + sizes[:-1]) / 2]).repeat(1 + 3 * width // len(sizes))
    codes = codes[: 2 * width].view(2, width)
    largest = torch.tensor([448.0 * 2.0**k * (1 + d * 2.0**-23) for k in (-14, -13, 0, 5) for d in (-1, 0, 1)])
    edges = largest[:, None] * torch.rand(12, width, generator=g)
    edges[:, ::TILE] = largest[:, None]  # where scales change
    hostile = torch.zeros(6, width)
    hostile[1] = random[0]
    hostile[1, [3, 130 % width, width - 1]] = torch.nan
    hostile[2] = random[1]
    hostile[2, [5, width - 1]] = torch.tensor([math.inf, -math.inf])
    hostile[3] = torch.nan
    hostile[4] = torch.tensor([LARGEST, -LARGEST]).repeat(width // 2)
    hostile[5] = torch.tensor([float32_at(1), -float32_at(0x7FFFFF)]).repeat(width // 2)
    return torch.cat([random, sized, codes * 3, codes * 2.0**-13, edges, hostile])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("latent", "rope"), SHAPES)
@kernels("cache_write")
def test_write_as_plain_python(kernel, place, latent, rope, dtype):
    """Every row to its slot; bytes between pages and of rows that nobody writes stay."""
    where = place(kernel, problem_of(latent, rope, dtype))
    rows = rows_of(latent, rope).to(dtype)
    layout = problem_of(latent, rope, dtype).layout
    pages = -(-len(rows) // 16) + 1
    storage = torch.full((pages, layout.page_bytes + 12), 0xAB, dtype=torch.uint8, device=where)
    cache = storage[:, : layout.page_bytes].view(layout.shape(pages))
    slots = torch.randperm(16 * pages, generator=torch.Generator().manual_seed(1))[: len(rows)]
    slots[7] = -1
    kernel.run(*rows.to(where).split([latent, rope], -1), cache, slots.to(where))
    wanted = torch.full(storage.shape, 0xAB, dtype=torch.uint8)
    for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
        if slot >= 0:
            bytes_of_row = torch.tensor(list(row_of(row[:latent], row[latent:])), dtype=torch.uint8)
            wanted[:, : layout.page_bytes].view(layout.shape(pages))[slot // 16, slot % 16] = bytes_of_row
    assert torch.equal(without_signs_of_nan(storage.cpu(), layout), without_signs_of_nan(wanted, layout))


def without_signs_of_nan(storage, layout):
    """Bytes with one NaN for all: its sign, and a bfloat16's other bits, are nobody's business."""
    row = PackedRow(latent=layout.geometry.kv_lora_rank, rope=layout.geometry.qk_rope_head_dim)
    rows = storage[:, : layout.page_bytes].reshape(-1, row.bytes).clone()
    codes, rope = rows[:, : row.latent], rows[:, row.rope_at :].contiguous().view(torch.bfloat16)
    codes[codes & 0x7F == 0x7F] = 0x7F
    rope[rope.isnan()] = torch.nan
    return torch.cat(
        [rows[:, : row.rope_at].flatten(), rope.view(torch.uint8).flatten(), storage[:, layout.page_bytes :].flatten()]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kernels("cache_gather")
def test_gather_reads_every_code(kernel, place, dtype):
    """Every code in every tile with scales of all kinds, as older writers leave them too, and special rotary values."""
    scales = [2.0**k for k in (0, -13, 1, 5, -3, 7, 3, -6)]
    if dtype in ROUNDED:
        scales[2:6] = 0.037, 0.0, 1.37, 3.3e-5
    if dtype == torch.float32:
        scales[6:] = 1e30, float32_at(1)
    rope = torch.tensor([0.0, -0.0, 1.5, -3.25, math.inf, -math.inf, math.nan, LARGEST, 2.0**-126]).repeat(8)[:64]
    rope_bytes = struct.pack("<64H", *(bits_of(x) >> 16 for x in rope.tolist()))
    rows = [bytes(range(256)) * 2 + struct.pack("<4f", *scales[i : i + 4]) + rope_bytes for i in (0, 4)]
    where = place(kernel, problem_of(512, 64, dtype, page_size=2))
    cache = torch.tensor([list(row) for row in rows], dtype=torch.uint8, device=where).view(1, 2, 656)
    table, starts = torch.zeros(1, 1, dtype=torch.int32, device=where), torch.zeros(1, dtype=torch.int32, device=where)
    bounds = torch.tensor([0, 2], dtype=torch.int32, device=where)
    out = torch.zeros(2, 576, dtype=dtype, device=where)
    kernel.run(cache, table, starts, bounds, out, max_key_len=2)
    wanted = torch.tensor([values_of(row, 512) for row in rows], dtype=torch.float64).float().to(dtype)
    assert torch.equal(out.isnan().cpu(), wanted.isnan())
    number = ~wanted.isnan()
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(out.cpu()[number].view(bits), wanted[number].view(bits)), "-0 is not 0 here"


def case_for(kernel, place, *arguments, **options):
    make = partial(make_decode, *arguments, cache_dtype=torch.uint8, **options)
    return make(device=place(kernel, problem_for(make())))


decodes = pytest.mark.parametrize("kernel", OPERATIONS["decode"], ids=lambda k: k.name)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [15, 200, 16, 1, 130], [700]], ids=str)
@decodes
def test_decode(kernel, place, seq_lens, dtype, needles):
    """Codes times powers of two are numbers of every dtype: the tolerances are those of any cache."""
    check(kernel, case_for(kernel, place, geometry(latent=256), seq_lens, dtype=dtype, needles=needles))


@pytest.mark.parametrize(
    ("heads", "latent", "rope", "page_size", "query_lens"),
    [(1, 128, 0, 1, 1), (5, 256, 32, 48, [3, 1]), (12, 512, 64, 64, 1), (20, 512, 64, 16, 2), (128, 128, 64, 128, 1)],
)
@decodes
def test_decode_geometries(kernel, place, heads, latent, rope, page_size, query_lens):
    options = {"page_size": page_size, "page_gap": 96, "query_lens": query_lens}
    check(kernel, case_for(kernel, place, geometry(heads, latent, rope), [129, 40], **options))


@decodes
def test_any_scale_is_read(kernel, place):
    """vLLM before its pull request 49435 wrote amax / 448 as it was."""
    case = case_for(kernel, place, geometry(5, 512, 64), [40, 130])
    scales = case.arrays[2][..., 512:528].view(torch.float32)
    scales *= 0.5 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(0)).to(scales.device)
    check(kernel, case)


def test_rows_that_nobody_owns_are_poison():
    cache = make_decode(geometry(5, 256, 32), [3], cache_dtype=torch.uint8, page_gap=4).arrays[2]
    values = reference.values_of(cache, 288, torch.float64)
    assert int((~values.isnan().any(-1)).sum()) == 3
    assert int(values.isnan().all(-1).sum()) == values[..., 0].numel() - 3


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gpus_without_fp8_take_it(operation, arch):
    """Prefill reads no cache, so that it may be any kernel; Hopper has one of its own for decode."""
    kernel = select(operation, problem_of(512, 64, torch.bfloat16, 64), Device("cuda", arch)).kernel.name
    assert operation == "prefill" or kernel.startswith("triton_") or (kernel, arch) == ("gluon_sm90", 90)


@pytest.mark.parametrize(
    ("shape", "strides", "reason"),
    [
        ((2, 16, 656), (16 * 656 + 2, 656, 1), r"must lie at multiples of 4 bytes, got \[0, 10498, 656\]"),
        ((2, 16, 640), (16 * 640, 640, 1), "no tile-scaled row|multiples of 128"),
        ((2, 16, 576), (16 * 576, 576, 1), "no tile-scaled row|multiples of 128"),
    ],
)
def test_bytes_that_are_no_rows_are_refused(shape, strides, reason):
    with pytest.raises(ValueError, match=reason):
        packed_row(torch.empty_strided(shape, strides, dtype=torch.uint8), 576)
