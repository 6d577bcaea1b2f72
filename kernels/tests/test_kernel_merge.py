"""Merging attention over parts of the keys: every kernel of OPERATIONS["merge"] against the float64 reference."""

from itertools import permutations

import pytest
import torch

from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, format_of, reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_prefill

HALF = [torch.float16, torch.bfloat16]


def problem_of(dtype=torch.float32, heads=2, v=64):
    geometry = MLAGeometry(num_heads=heads, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=v)
    return Problem(layout=CacheLayout(geometry=geometry, format=format_of(torch.float32), page_size=16), dtype=dtype)


@pytest.fixture(params=OPERATIONS["merge"], ids=lambda k: k.name)
def kernel(request):
    return request.param


def make_part(tokens, heads, v, *, dtype, seed, where):
    """One partial result: values and LSE from a few e-folds apart to hopelessly far apart."""
    g = torch.Generator().manual_seed(seed)
    lse = torch.randn(tokens, heads, generator=g) * 10.0 ** torch.randint(0, 4, (tokens, heads), generator=g)
    return torch.randn(tokens, heads, v, generator=g).to(device=where, dtype=dtype), lse.to(where)


def heads_first(lse):
    """The same numbers as a view of a wider tensor with heads first, as vLLM passes them."""
    wide = torch.full((lse.shape[1], lse.shape[0] + 3), torch.nan, device=lse.device)
    wide[:, : lse.shape[0]] = lse.T
    return wide.T[: lse.shape[0]]


def merged_in_float64(out, lse, part, part_lse):
    return reference.merge(out.double(), lse.double(), part.double(), part_lse.double())


def assert_merged(got, expected, dtype):
    assert_matches("lse", got[1], expected[1], LSE_TOLERANCE)
    assert_matches("out", got[0], expected[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "v"), [(1, 1, 64), (7, 5, 128), (2, 20, 192), (3, 12, 256), (1, 128, 64)])
def test_merge(kernel, place, tokens, heads, v, dtype):
    where = place(kernel, problem_of(dtype, heads, v))
    if where == "cpu" and dtype == torch.bfloat16 and kernel.name.startswith("triton"):
        pytest.skip("the interpreter rounds to bfloat16 by cutting off")
    out, lse = make_part(tokens, heads, v, dtype=dtype, seed=0, where=where)
    part, part_lse = make_part(tokens, heads, v, dtype=dtype, seed=1, where=where)
    expected = merged_in_float64(out, lse, part, part_lse)
    wide = torch.full((tokens, heads + 1, v + 8), torch.nan, dtype=dtype, device=where)
    view, view_lse = wide[:, :heads, :v].copy_(out), heads_first(lse)
    got = kernel.run(view, view_lse, part, heads_first(part_lse))
    assert_merged(got, expected, dtype)
    assert got[0].data_ptr() == view.data_ptr()
    assert got[1].data_ptr() == view_lse.data_ptr()
    assert int(wide.isnan().sum()) == wide.numel() - view.numel(), "wrote beside the output"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parts_that_saw_nothing_have_no_weight(kernel, place, dtype):
    """Their values are NaN, as memory that nobody wrote may be."""
    where = place(kernel, problem_of(dtype))
    parts = [make_part(12, 2, 64, dtype=dtype, seed=seed, where=where) for seed in range(2)]
    for (values, lse), empty in zip(parts, (slice(0, 8), slice(4, 10)), strict=True):
        values[empty], lse[empty] = torch.nan, -torch.inf
    (out, lse), (part, part_lse) = parts
    first, first_lse = out.clone(), lse.clone()
    got = kernel.run(out, lse, part, part_lse)
    assert_merged(got, merged_in_float64(first, first_lse, part, part_lse), dtype)
    assert torch.equal(got[0][:4], part[:4])
    assert torch.equal(got[0][8:10], first[8:10])
    assert (got[0][4:8] == 0).all()
    assert (got[1][4:8] == -torch.inf).all()


def test_order_does_not_matter(kernel, place):
    where = place(kernel, problem_of())
    parts = [make_part(6, 2, 64, dtype=torch.float32, seed=seed, where=where) for seed in range(3)]
    parts[1][1][2:4] = -torch.inf
    results = []
    for order in permutations(parts):
        out, lse = (x.clone() for x in order[0])
        for part, part_lse in order[1:]:
            kernel.run(out, lse, part, part_lse)
        results.append((out, lse))
    for out, lse in results[1:]:
        assert_merged((out, lse), results[0], torch.float32)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
def test_merged_parts_are_attention_over_all_keys(kernel, place, needles):
    """Context first, new tokens second, as chunked prefill does it."""
    where = place(kernel, problem_of())
    geometry = problem_of().geometry
    case = make_prefill(geometry, [20], [75], causal=False, needles=needles, device=where)
    q, k_nope, k_rope, v, query_start, _ = case.arrays
    parts = []
    for first, last in ((0, 33), (33, 75)):
        keys = [x[first:last] for x in (k_nope, k_rope, v)]
        bounds = torch.tensor([0, last - first], device=where)
        parts.append(reference.prefill(q, *keys, query_start, bounds, **case.options))
    got = kernel.run(*parts[0], *parts[1])
    assert_merged(got, case.reference(), torch.float32)


def test_refusals():
    triton, plain = OPERATIONS["merge"]
    assert triton.unsupported(problem_of(torch.float64), Device("cuda", 90)) == [
        "outputs must be float32, float16 or bfloat16, got torch.float64"
    ]
    assert triton.unsupported(problem_of(), Device("cpu")) == ["needs a GPU (or TRITON_INTERPRET=1), got cpu"]
    assert plain.unsupported(problem_of(), Device("cpu")) == []
    assert plain.unsupported(problem_of(), Device("cuda", 90, "H200")) == ["runs on CPU tensors, got H200 sm_90"]
