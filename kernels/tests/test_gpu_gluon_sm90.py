"""The Hopper decode kernel against the float64 reference: every shape of row tile, page, cut and edge that it has."""

import pytest
import torch
from hopper_devices import NEEDS_HOPPER

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, device_of, format_of
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode

pytestmark = NEEDS_HOPPER

TWO_AND_A_BIT = 0x40100000  # 2.25 as an integer: scratch holds what others left, such as floats
KERNEL = next(k for k in OPERATIONS["decode"] if k.name == "gluon_sm90")


@pytest.fixture(autouse=True, params=[0, 32], ids=["rows", "columns"])
def few_rows(monkeypatch, request):
    """Up to which queries are columns of the matrix instructions: never, and as it is."""
    monkeypatch.setattr(KERNEL.load(), "_FEW_ROWS", request.param)


def geometry(heads=16, rope=64):
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128)


def poisoned_workspace(case):
    cache = case.arrays[2]
    layout = CacheLayout(geometry=case.geometry, format=format_of(cache.dtype), page_size=cache.shape[1])
    problem = Problem(layout=layout, dtype=cache.dtype, max_query_len=case.options["query_len"])
    assert KERNEL.unsupported(problem, device_of(cache)) == []
    shapes = KERNEL.load().workspace(problem, device_of(cache), max_requests=len(case.arrays[4]))
    return tuple(
        torch.full(shape, TWO_AND_A_BIT if dtype == torch.int32 else torch.nan, dtype=dtype, device="cuda")
        for shape, dtype in shapes
    )


def check(case):
    q_latent = case.arrays[0]
    out, lse = torch.full_like(q_latent, torch.nan), torch.full(q_latent.shape[:2], torch.nan, device="cuda")
    KERNEL.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=poisoned_workspace(case))
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q_latent.dtype], case.magnitude())
    return out, lse


def make(heads, seq_lens, *, rope=64, dtype=torch.bfloat16, page_size=64, **options):
    return make_decode(geometry(heads, rope), seq_lens, page_size=page_size, dtype=dtype, device="cuda", **options)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [128], [15, 200, 16, 1, 130], [3000, 5, 700]], ids=str)
def test_lengths_around_every_edge(seq_lens, dtype, needles):
    check(make(16, seq_lens, dtype=dtype, needles=needles))


@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 64, 65, 128])
@pytest.mark.parametrize("rope", [64, 0])
def test_heads(heads, rope):
    check(make(heads, [129, 40, 1000], rope=rope))


@pytest.mark.parametrize("page_gap", [0, 576, 96], ids=["dense", "tma", "gather"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128, 192])
def test_pages(page_size, page_gap):
    """Pages of 16, 32 and multiples of 64 by TMA, if the gap between two is a number of rows; others row by row."""
    check(make(16, [page_size + 1, max(page_size - 1, 1), 131, 777], page_size=page_size, page_gap=page_gap))


@pytest.mark.parametrize("heads", [5, 16, 128])
@pytest.mark.parametrize("query_len", [2, 4, 16])
def test_several_query_tokens_are_causal(heads, query_len):
    check(make(heads, [query_len, query_len + 1, 130, 64, 1500], query_lens=query_len))


def test_query_tokens_before_the_sequence_see_nothing():
    check(make(16, [0, 2, 40], query_lens=4))


def test_ragged():
    check(make(16, [5, 70, 1, 33, 2000], query_lens=[5, 1, 1, 3, 2]))
    check(make(16, [5, 70, 9], query_lens=[2, 0, 3]))
    check(make(128, [5, 700, 900], query_lens=[2, 0, 16]))


@pytest.mark.parametrize("batch", [1, 2, 40, 131, 133, 300])
@pytest.mark.parametrize("heads", [16, 128])
def test_batches_cut_in_every_way(batch, heads):
    seq_lens = [1 + (i * i * 97 + 31 * batch) % 1200 for i in range(batch)]
    out, lse = check(make(heads, seq_lens))
    again = check(make(heads, seq_lens))
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_one_long_request_among_short_ones():
    check(make(16, [3, 20000, 1, 30, 64]))


def test_strided_queries_and_outputs():
    case = make(16, [40, 700])
    latent, rope, *rest = case.arrays
    wide = torch.full((*latent.shape[:2], 800), torch.nan, dtype=latent.dtype, device="cuda")
    wide[..., :512], wide[..., 600:664] = latent, rope
    by_head = torch.empty(16, 2, 512, dtype=latent.dtype, device="cuda").transpose(0, 1).copy_(latent)
    for q_latent in (wide[..., :512], by_head):
        arrays = (q_latent, wide[..., 600:664], *rest)
        check(type(case)(geometry=case.geometry, arrays=arrays, options=case.options))
