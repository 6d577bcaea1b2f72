"""Cache writes and gathers: every kernel against the reference, bit by bit."""

import pytest
import torch

from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, format_of, reference
from mla_kernels.testing import make_pool

SENTINEL = -7.0
PAGE_SIZES = (1, 16, 32, 64, 128)


def problem_of(latent, rope, page_size, dtype, cache_dtype=None):
    geometry = MLAGeometry(num_heads=1, kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=rope, v_head_dim=64)
    layout = CacheLayout(geometry=geometry, format=format_of(cache_dtype or dtype), page_size=page_size)
    return Problem(layout=layout, dtype=dtype)


@pytest.fixture(params=OPERATIONS["cache_write"], ids=lambda k: k.name)
def write(request):
    return request.param


@pytest.fixture(params=OPERATIONS["cache_gather"], ids=lambda k: k.name)
def gather(request):
    return request.param


def pool_of(pages, page_size, row_elements, gap, dtype, where):
    """A pool full of sentinels: its storage, pages and what lies between them, and the cache alone."""
    storage = torch.full((pages, page_size * row_elements + gap), SENTINEL, dtype=dtype, device=where)
    return storage, storage[:, : page_size * row_elements].view(pages, page_size, row_elements)


def wide_rows(latent, rope, tokens, dtype, where):
    """Latent and rotary key as engines have them: slices of a projection's output."""
    wide = torch.randn(tokens, latent + rope + 24, generator=torch.Generator().manual_seed(tokens))
    wide = wide.to(device=where, dtype=dtype)
    return wide[:, :latent], wide[:, latent + 8 : latent + 8 + rope]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(
    ("latent", "rope", "gap", "dtype", "slot_dtype"),
    [
        (512, 64, 0, torch.bfloat16, torch.int64),
        (128, 0, 96, torch.float32, torch.int64),
        (320, 32, 40, torch.float16, torch.int32),
    ],
    ids=str,
)
def test_write(write, place, page_size, latent, rope, gap, dtype, slot_dtype):
    """Shuffled slots, some of them outside the pool; all other rows, and what lies between pages, stay."""
    where = place(write, problem_of(latent, rope, page_size, dtype))
    pages = 3 + 12 // page_size
    storage, cache = pool_of(pages, page_size, latent + rope, gap, dtype, where)
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(1))[:9]
    slots[2], slots[5], slots[7] = -1, pages * page_size, 2**31 - 1
    slots = slots.to(device=where, dtype=slot_dtype)
    rows = wide_rows(latent, rope, 9, dtype, where)
    expected, expected_cache = pool_of(pages, page_size, latent + rope, gap, dtype, where)
    reference.cache_write(*rows, expected_cache, slots)
    write.run(*rows, cache, slots)
    assert torch.equal(storage, expected)


def test_write_more_rows_than_slots(write, place):
    """Captured graphs pad the rows, not the slots: only rows with a slot count."""
    where = place(write, problem_of(128, 32, 16, torch.float32))
    _, cache = pool_of(3, 16, 160, 0, torch.float32, where)
    latent, rope = wide_rows(128, 32, 9, torch.float32, where)
    write.run(latent, rope, cache, torch.tensor([17, 3], device=where))
    assert torch.equal(cache[1, 1], torch.cat([latent[0], rope[0]]))
    assert torch.equal(cache[0, 3], torch.cat([latent[1], rope[1]]))
    assert int((cache != SENTINEL).any(-1).sum()) == 2


def test_write_nothing(write, place):
    where = place(write, problem_of(128, 32, 16, torch.float32))
    storage, cache = pool_of(3, 16, 160, 0, torch.float32, where)
    write.run(*wide_rows(128, 32, 0, torch.float32, where), cache, torch.zeros(0, dtype=torch.int64, device=where))
    assert (storage == SENTINEL).all()


def test_write_converts(write, place):
    where = place(write, problem_of(128, 32, 16, torch.float32, torch.float16))
    _, cache = pool_of(3, 16, 160, 0, torch.float16, where)
    latent, rope = wide_rows(128, 32, 2, torch.float32, where)
    write.run(latent, rope, cache, torch.tensor([17, 3], device=where))
    assert torch.equal(cache[1, 1], torch.cat([latent[0], rope[0]]).half())


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(
    ("width", "gap", "dtype", "out_dtype"),
    [
        (576, 96, torch.bfloat16, torch.bfloat16),
        (128, 0, torch.float16, torch.float32),
        (352, 40, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_gather(gather, place, page_size, width, gap, dtype, out_dtype):
    """Requests begin anywhere, end on both sides of tile and page edges, and some have no rows."""
    where = place(gather, problem_of(width, 0, page_size, out_dtype, dtype))
    g = torch.Generator().manual_seed(0)
    starts, counts = [0, 5, 0, page_size - 1, 31], [17, 0, 1, 2, page_size + 16]
    rows = [torch.randn(s + c, width, generator=g) for s, c in zip(starts, counts, strict=True)]
    dense, table = make_pool(rows, width, page_size=page_size, generator=g)
    _, cache = pool_of(len(dense), page_size, width, gap, dtype, where)
    cache.copy_(dense)
    bounds = torch.tensor([2, *counts]).cumsum(0)
    starts, bounds = (torch.tensor(x).to(device=where, dtype=torch.int32) for x in (starts, bounds.tolist()))
    arrays = (cache, table.to(where), starts, bounds)
    wide, expected = (torch.full((sum(counts) + 5, width + 8), SENTINEL, dtype=out_dtype, device=where) for _ in "ab")
    reference.cache_gather(*arrays, expected[:, :width], max_key_len=max(counts))
    gather.run(*arrays, wide[:, :width], max_key_len=max(counts))
    assert torch.equal(wide, expected)
    assert torch.equal(wide[2:19, :width].cpu(), rows[0].to(dtype).to(out_dtype))


def test_gather_nothing(gather, place):
    where = place(gather, problem_of(128, 0, 16, torch.float32))
    _, cache = pool_of(3, 16, 128, 0, torch.float32, where)
    out = torch.full((4, 128), SENTINEL, device=where)
    table, starts = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    bounds = torch.zeros(2, dtype=torch.int32, device=where)
    gather.run(cache, table.to(where), starts.to(where), bounds, out, max_key_len=0)
    assert (out == SENTINEL).all()


@pytest.mark.parametrize("operation", ["cache_write", "cache_gather"])
def test_refusals(operation):
    triton, plain = OPERATIONS[operation]
    problem = problem_of(512, 64, 64, torch.bfloat16)
    assert triton.unsupported(problem, Device("cuda", 90)) == []
    assert triton.unsupported(problem, Device("cpu")) == ["needs a GPU (or TRITON_INTERPRET=1), got cpu"]
    assert triton.unsupported(problem, Device("cuda", 75)) == ["needs sm_80 or newer, got sm_75"]
    assert plain.unsupported(problem, Device("cpu")) == []
    assert plain.unsupported(problem, Device("hip", "gfx942", "MI300X")) == ["runs on CPU tensors, got MI300X gfx942"]
