"""The fp8 cache (e4m3): every code and every way to round, bit by bit, and decode over it."""

import math
from functools import partial

import pytest
import torch
from plain_fp8 import SIZES, code_of, float32_at, value_of

from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, format_of, reference, select
from mla_kernels.device import device_of, interpreting
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode

ON_GPU = torch.cuda.is_available() and not interpreting()
# The interpreter rounds bfloat16 wrongly (CONTRIBUTING.md); what needs no rounding is right there too.
ROUNDED = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
E4M3 = torch.float8_e4m3fn
SCALES = (None, 0.037, 4.0)


def test_plain_python_knows_e4m3():
    """Numbers from the specification's table."""
    assert (SIZES[1], SIZES[7], SIZES[8], SIZES[0x7E]) == (2**-9, 0.875 * 2**-6, 2**-6, 448.0)
    assert [code_of(x) for x in (1.0, -1.0, 464.0, 2**-10, 3 * 2**-10)] == [0x38, 0xB8, 0x7E, 0, 2]


def interesting() -> torch.Tensor:
    """Every code's value, the middle between any two, their neighbours in float32, and what is special; both signs."""
    values = torch.tensor(SIZES)
    edges = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([464.0, 480.0, 512.0, 2.0**-11])])
    near = [edges, *(edges.nextafter(torch.tensor(to)) for to in (math.inf, 0.0))]
    special = [0.0, math.inf, 3e38, 65504.0, *map(float32_at, (1, 0x7FFFFF, 0x800000, 0x7FC00000, 0x7F800001))]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2000,), generator=generator).to(torch.int32).view(torch.float32)
    every = torch.cat([*near, torch.tensor(special), random, torch.randn(999, generator=generator)])
    every = torch.cat([every, -every])
    return torch.cat([every, torch.zeros(-len(every) % 160)]).view(-1, 160)


def problem_of(page_size, dtype, latent=128, rope=32, heads=1):
    geometry = MLAGeometry(
        num_heads=heads, kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=rope, v_head_dim=64
    )
    return Problem(layout=CacheLayout(geometry=geometry, format=format_of(E4M3), page_size=page_size), dtype=dtype)


def on_device(scale, where):
    return None if scale is None else torch.tensor([scale], device=where)


class Reference:
    """The reference as if it were one of the kernels."""

    name = "reference"

    def __init__(self, operation):
        self.run = getattr(reference, operation)

    def unsupported(self, problem, device):
        return []


def kernels(operation):
    return pytest.mark.parametrize("kernel", [Reference(operation), *OPERATIONS[operation]], ids=lambda k: k.name)


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@kernels("cache_write")
def test_write_rounds_as_plain_python(kernel, place, dtype, scale):
    where = place(kernel, problem_of(16, dtype))
    rows = (interesting() * (scale or 1.0)).to(dtype)
    cache = torch.zeros(-(-len(rows) // 16), 16, 160, dtype=E4M3, device=where)
    latent, rope = rows.to(where).split([128, 32], -1)
    kernel.run(latent, rope, cache, torch.arange(len(rows), device=where), cache_scale=on_device(scale, where))
    divided = rows.float() if scale is None else rows.float() / torch.tensor(scale)
    wanted = [code_of(x) for x in divided.flatten().tolist()]
    got = cache.cpu().view(torch.uint8).flatten()[: len(wanted)].tolist()
    got = [0x7F if code == 0xFF else code for code in got]  # NaN of either sign: a GPU's arithmetic drops it
    wrong = [(x, hex(g), hex(w)) for x, g, w in zip(divided.flatten().tolist(), got, wanted, strict=True) if g != w]
    assert not wrong, f"{len(wrong)} wrong, such as (value, got, wanted) {wrong[:5]}"
    assert set(got) == set(range(255)), "every number was to occur, and NaN"


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@kernels("cache_gather")
def test_gather_reads_every_code(kernel, place, dtype, scale):
    if scale == 0.037 and dtype not in ROUNDED:
        pytest.skip("the interpreter rounds bfloat16 wrongly")
    where = place(kernel, problem_of(2, dtype, latent=128, rope=0))
    codes = torch.arange(256, dtype=torch.uint8).view(1, 2, 128)
    cache = codes.to(where).view(E4M3)
    table, starts = torch.zeros(1, 1, dtype=torch.int32, device=where), torch.zeros(1, dtype=torch.int32, device=where)
    bounds = torch.tensor([0, 2], dtype=torch.int32, device=where)
    out = torch.zeros(2, 128, dtype=dtype, device=where)
    kernel.run(cache, table, starts, bounds, out, max_key_len=2, cache_scale=on_device(scale, where))
    wanted = torch.tensor([value_of(code) for code in range(256)])
    wanted = (wanted if scale is None else wanted * torch.tensor(scale)).to(dtype)
    out = out.cpu().flatten()
    assert torch.equal(out.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(out[number].view(bits), wanted[number].view(bits)), "-0 is not 0 here"


def geometry(heads=5, latent=128, rope=32):
    return MLAGeometry(num_heads=heads, kv_lora_rank=latent, qk_rope_head_dim=rope, qk_nope_head_dim=64, v_head_dim=64)


def problem_for(case) -> Problem:
    q_latent, cache = case.arrays[0], case.arrays[2]
    layout = CacheLayout(geometry=case.geometry, format=format_of(cache.dtype), page_size=cache.shape[1])
    return Problem(layout=layout, dtype=q_latent.dtype, max_query_len=case.options["query_len"])


def case_for(kernel, place, *arguments, **options):
    """A decode of an fp8 cache where the kernel runs."""
    make = partial(make_decode, *arguments, cache_dtype=E4M3, **options)
    return make(device=place(kernel, problem_for(make())))


def check(kernel, case):
    q_latent, cache, seq_lens = case.arrays[0], case.arrays[2], case.arrays[4]
    shapes = kernel.load().workspace(problem_for(case), device_of(cache), max_requests=len(seq_lens))
    workspace = tuple(torch.full(shape, 7, dtype=dtype, device=cache.device) for shape, dtype in shapes)
    out = torch.full_like(q_latent, torch.nan)
    lse = torch.full(q_latent.shape[:2], torch.nan, dtype=torch.float32, device=cache.device)
    kernel.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=workspace)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q_latent.dtype], case.magnitude())


decodes = pytest.mark.parametrize("kernel", OPERATIONS["decode"], ids=lambda k: k.name)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [15, 200, 16, 1, 130], [700]], ids=str)
@decodes
def test_decode(kernel, place, seq_lens, dtype, scale, needles):
    """The reference reads the same codes, so the tolerances are those of any cache."""
    check(kernel, case_for(kernel, place, geometry(), seq_lens, dtype=dtype, cache_scale=scale, needles=needles))


@pytest.mark.parametrize(
    ("heads", "latent", "rope", "page_size", "query_lens"),
    [(1, 128, 0, 1, 1), (5, 256, 32, 48, [3, 1]), (12, 512, 64, 64, 1), (20, 512, 0, 16, 2), (128, 128, 64, 128, 1)],
)
@decodes
def test_decode_geometries(kernel, place, heads, latent, rope, page_size, query_lens):
    options = {"page_size": page_size, "page_gap": 96, "query_lens": query_lens, "cache_scale": 0.3}
    check(kernel, case_for(kernel, place, geometry(heads, latent, rope), [129, 40], **options))


@decodes
def test_scale_is_read_when_the_kernel_runs(kernel, place):
    """An engine may load new scales in place, and a captured graph must see them."""
    case = case_for(kernel, place, geometry(), [40, 7], cache_scale=0.5)
    check(kernel, case)
    case.options["cache_scale"].fill_(0.25)
    check(kernel, case)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gpus_without_fp8_take_it(operation, arch):
    """Prefill reads no cache, so that it may be any kernel; Hopper has one of its own for decode."""
    problem = problem_of(64, torch.bfloat16, latent=512, rope=64)
    kernel = select(operation, problem, Device("cuda", arch)).kernel.name
    assert operation == "prefill" or kernel.startswith("triton_") or (kernel, arch) == ("gluon_sm90", 90)
