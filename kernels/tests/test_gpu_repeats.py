"""On a Hopper GPU: calls whose launches are repeated for other tensors give the bits that they give when made anew."""

import pytest
import torch
from hopper_devices import NEEDS_HOPPER, geometry

from mla_kernels import CacheLayout, Problem, device_of, format_of, repeats
from mla_kernels.cache import triton_gather, triton_write
from mla_kernels.decode import gluon_sm90
from mla_kernels.prefill import gluon_sm90_ragged
from mla_kernels.testing import make_decode, make_prefill

pytestmark = NEEDS_HOPPER
PAGE = 64
HERE = "cuda"


@pytest.fixture
def check(monkeypatch):
    """check(make, run): make(seed) makes a call's tensors, run(tensors) answers."""
    recorded, calls = repeats.recorded, []
    monkeypatch.setattr(repeats, "recorded", lambda: calls.append(1) or recorded())

    def check(make, run):
        first, second = make(0), make(1)
        for _ in range(2):
            run(first)
        calls.clear()
        repeated = [x.clone() for x in run(second)]
        assert not calls, "a call was made anew"
        repeats.forget()
        for got, expected in zip(repeated, run(second), strict=True):
            assert torch.equal(got, expected)
        assert not torch.equal(repeated[0], run(first)[0])

    return check


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("query_lens", [1, [1, 3, 2]], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_decode(check, heads, query_lens, cache_dtype):
    problem = Problem(
        layout=CacheLayout(geometry=geometry(heads), format=format_of(cache_dtype), page_size=PAGE),
        dtype=torch.bfloat16,
        max_query_len=3,
    )
    shapes = gluon_sm90.workspace(problem, device_of(HERE), max_requests=4)
    workspace = [torch.empty(shape, dtype=dtype, device=HERE) for shape, dtype in shapes]
    scaled = {"cache_scale": 0.5} if cache_dtype == torch.float8_e4m3fn else {}

    def make(seed):
        return make_decode(
            geometry(heads), [700, 3000, 5], query_lens=query_lens, page_size=PAGE, dtype=torch.bfloat16,
            cache_dtype=cache_dtype, seed=seed, device=HERE, **scaled,
        )  # fmt: skip

    check(make, lambda case: gluon_sm90.run(*case.arrays, **case.options, workspace=workspace))


@pytest.mark.parametrize("causal", [True, False])
def test_prefill(check, causal):
    lens = [400, 1, 1300]

    def make(seed):
        keys = [n + 90 * (not causal) for n in lens]
        case = make_prefill(geometry(16), lens, keys, causal=causal, dtype=torch.bfloat16, seed=seed, device=HERE)
        return case, torch.zeros(1, dtype=torch.int32, device=HERE)

    def run(made):
        case, counter = made
        out = torch.empty(*case.arrays[0].shape[:2], 128, dtype=torch.bfloat16, device=HERE)
        lse = torch.empty(case.arrays[0].shape[:2], device=HERE)
        return gluon_sm90_ragged.run(
            *case.arrays, **case.options, out_TNV=out, lse_TN=lse, counter=counter.zero_(), pieces=1
        )

    check(make, run)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_cache_traffic(check, cache_dtype):
    def make(seed):
        case = make_decode(
            *(geometry(1), [70, 9]),
            page_size=PAGE,
            dtype=torch.bfloat16,
            cache_dtype=cache_dtype,
            seed=seed,
            device=HERE,
        )
        torch.manual_seed(seed)
        new = [torch.randn(7, width, device=HERE).bfloat16() for width in (512, 64)]
        slots, scale = torch.randperm(100, device=HERE)[:7], torch.full((1,), 0.5 + seed, device=HERE)
        starts, ends = (torch.tensor(x, dtype=torch.int32, device=HERE) for x in ([3, 0], [0, 40, 49]))
        return case.arrays[2:4], new, slots, scale, starts, ends

    def run(made):
        (cache, table), new, slots, scale, starts, ends = made
        rows = torch.zeros(49, 576, device=HERE, dtype=torch.bfloat16)
        triton_write.run(*new, cache, slots, cache_scale=scale)
        triton_gather.run(cache, table, starts, ends, rows, max_key_len=40, cache_scale=scale)
        return rows, cache.view(torch.uint8)

    check(make, run)
