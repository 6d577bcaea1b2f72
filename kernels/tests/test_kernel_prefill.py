"""Ragged prefill: every kernel of OPERATIONS["prefill"] against the float64 reference."""

import pytest
import torch

from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, format_of, reference
from mla_kernels.testing import (
    LSE_TOLERANCE,
    TOLERANCE,
    RaggedCase,
    assert_matches,
    check_prefill,
    make_prefill,
)

KERNELS = OPERATIONS["prefill"]
EDGE_LENGTHS = ([1, 0, 16, 63], [64, 65], [17, 129])


def geometry(num_heads=2, nope=64, rope=32, v=64):
    return MLAGeometry(num_heads=num_heads, kv_lora_rank=64, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v)


def problem_of(geometry, dtype=torch.float32):
    layout = CacheLayout(geometry=geometry, format=format_of(torch.float32), page_size=16)
    return Problem(layout=layout, dtype=dtype)


@pytest.fixture(params=KERNELS, ids=lambda k: k.name)
def kernel(request):
    return request.param


@pytest.fixture
def check(kernel, place):
    """Run the kernel on the case that `make_prefill` makes, into outputs full of NaN, and compare."""

    def run(geometry, *lens, dtype=torch.float32, change=lambda case: case, accumulate=False, **options):
        where = place(kernel, problem_of(geometry, dtype))
        if where == "cpu" and dtype == torch.bfloat16 and kernel.name.startswith("triton"):
            pytest.skip("the interpreter rounds to bfloat16 by cutting off")
        case = change(make_prefill(geometry, *lens, dtype=dtype, device=where, **options))
        check_prefill(kernel.run, case, accumulate=accumulate)

    return run


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lens", EDGE_LENGTHS, ids=str)
def test_causal_lengths_around_every_edge(check, lens, dtype, needles):
    check(geometry(), lens, dtype=dtype, needles=needles)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65]], ids=str)
def test_every_query_sees_every_key(check, key_lens, dtype, needles):
    check(geometry(), [20, 3, 65], key_lens, causal=False, dtype=dtype, needles=needles)


@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [([1, 1, 1], [64, 65, 128]), ([5, 70], [67, 71]), ([65, 2], [128, 0])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_causal_queries_are_the_last_of_more_keys(check, query_lens, key_lens, dtype):
    check(geometry(), query_lens, key_lens, dtype=dtype)


def test_queries_before_the_first_key_see_nothing(check):
    check(geometry(), [70, 3, 66], [5, 1, 65])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_lens", [[200, 64, 1, 5], [63, 0, 65, 0], [0, 0, 0, 0]], ids=str)
def test_accumulates(check, key_lens, dtype):
    check(geometry(), [20, 3, 65, 0], key_lens, causal=False, dtype=dtype, accumulate=True)


@pytest.mark.parametrize(("heads", "nope", "rope", "v"), [(20, 192, 64, 256), (2, 192, 0, 192), (3, 24, 8, 12)])
def test_accumulates_in_every_width(check, heads, nope, rope, v):
    check(geometry(heads, nope, rope, v), [9], [70], causal=False, dtype=torch.float16, accumulate=True)


def test_accumulates_what_is_causal(check):
    check(geometry(), [70, 3, 66], [65, 1, 130], accumulate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_chunks_round_no_more_than_merging_would(kernel, place, dtype):
    """Context of 40 chunks: as one, and closer to it than the same chunks by themselves, merged one after another."""
    chunks, tokens, rows = 40, 5, 33
    where = place(kernel, problem_of(geometry(), dtype))
    whole = make_prefill(geometry(), [tokens], [chunks * rows], causal=False, dtype=dtype, device=where, needles=False)
    q, *keys, query_start, _ = whole.arrays
    bounds = torch.tensor([0, rows], dtype=torch.int32, device=where)
    answers = []
    for accumulate in (True, False):
        out, lse = torch.full((tokens, 2, 64), torch.nan).to(q), torch.full((tokens, 2), -torch.inf).to(where)
        for first in range(0, chunks * rows, rows):
            arrays = (q, *(x[first : first + rows] for x in keys), query_start, bounds)
            if accumulate:
                kernel.run(*arrays, **whole.options, accumulate=True, out_TNV=out, lse_TN=lse)
            else:
                out, lse = reference.merge(out, lse, *kernel.run(*arrays, **whole.options))
        answers.append((out, lse))
    expected, expected_lse = whole.reference()
    assert_matches("lse", answers[0][1], expected_lse, LSE_TOLERANCE)
    if dtype == torch.float32:
        assert_matches("out", answers[0][0], expected, TOLERANCE[dtype])
        return
    accumulated, merged = ((out.double() - expected).square().mean().sqrt() for out, _ in answers)
    assert accumulated < merged


def test_nothing_to_accumulate_in_is_refused(kernel, place):
    case = make_prefill(geometry(), [4], device=place(kernel, problem_of(geometry())))
    with pytest.raises(ValueError, match="accumulate needs out_TNV and lse_TN"):
        kernel.run(*case.arrays, **case.options, accumulate=True)


@pytest.mark.parametrize(
    ("heads", "nope", "rope", "v"),
    [
        (1, 64, 32, 64),
        (5, 96, 32, 96),
        (12, 128, 64, 128),
        (20, 192, 64, 256),
        (2, 256, 0, 256),
        (1, 128, 64, 192),
        (2, 192, 0, 192),
        (3, 24, 8, 12),
        (128, 64, 0, 64),
    ],
)
def test_geometries(check, heads, nope, rope, v):
    check(geometry(heads, nope, rope, v), [9], [30 if heads == 128 else 70], dtype=torch.float16)


def test_views_of_concatenated_keys_and_wide_queries(check):
    """vLLM hands over one tensor of whole keys, and queries may be a slice of a projection's output."""

    def concatenate(case):
        q, k_nope, k_rope, v, *starts = case.arrays
        k = torch.cat([k_nope, k_rope], -1)
        wide = torch.full((len(q), q.shape[1] + 1, q.shape[2] + 32), torch.nan, dtype=q.dtype, device=q.device)
        view = wide[:, 1:, : q.shape[2]].copy_(q)
        arrays = (view, k[..., : k_nope.shape[-1]], k[..., k_nope.shape[-1] :], v, *starts)
        return RaggedCase(geometry=case.geometry, arrays=arrays, options=case.options)

    check(geometry(), [70, 9], [100, 9], change=concatenate)


def test_long_starts_and_allocated_outputs(kernel, place):
    """Starts may be int64, and outputs may be left to the kernel."""
    shape = geometry()
    case = make_prefill(shape, [17, 5], device=place(kernel, problem_of(shape)))
    *values, query_start, key_start = case.arrays
    out, lse = kernel.run(*values, query_start.long(), key_start.long(), **case.options)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float32])
    assert lse.dtype == torch.float32
    assert out.dtype == torch.float32


def test_torch_kernel_in_chunks(monkeypatch):
    """The score buffer holds a few queries at a time."""
    kernel = next(k for k in KERNELS if k.name == "torch_prefill")
    monkeypatch.setattr(kernel.load(), "_MOST_SCORES", 2 * 40 * 7)
    case = make_prefill(geometry(), [33, 3], [40, 3])
    expected, expected_lse = case.reference()
    out, lse = kernel.run(*case.arrays, **case.options)
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float32])


def test_triton_kernel_refuses_scattered_values(kernel, place):
    if not kernel.name.startswith("triton"):
        pytest.skip("takes any stride")
    case = make_prefill(geometry(), [4], device=place(kernel, problem_of(geometry())))
    q, *rest = case.arrays
    with pytest.raises(ValueError, match="must be contiguous: q has stride 2"):
        kernel.run(q.mT.contiguous().mT, *rest, **case.options)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "wanted"),
    [
        ("triton_ragged", Device("cuda", 90), torch.bfloat16, []),
        ("triton_ragged", Device("hip", "gfx942"), torch.float16, []),
        ("triton_ragged", Device("cpu"), torch.float32, ["needs a GPU (or TRITON_INTERPRET=1), got cpu"]),
        (
            "triton_ragged",
            Device("cuda", 75, "T4"),
            torch.float64,
            ["needs sm_80 or newer, got sm_75", "queries must be float32, float16 or bfloat16, got torch.float64"],
        ),
        ("torch_prefill", Device("cpu"), torch.bfloat16, []),
        ("torch_prefill", Device("cuda", 90, "H200"), torch.bfloat16, ["runs on CPU tensors, got H200 sm_90"]),
    ],
)
def test_refusals(name, device, dtype, wanted):
    kernel = next(k for k in KERNELS if k.name == name)
    assert kernel.unsupported(problem_of(geometry(), dtype), device) == wanted
