"""FlashInfer's kernels behind our contract against the float64 reference, with FlashInfer itself on a Hopper GPU.

In bfloat16 with pages, widths and masks that its ready-made kernels have; without those the first test waits for nvcc.
"""

from importlib.util import find_spec

import pytest
import torch
from hopper_devices import NEEDS_HOPPER

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, device_of, format_of
from mla_kernels.testing import (
    LSE_TOLERANCE,
    TOLERANCE,
    assert_matches,
    check_prefill,
    make_decode,
    make_prefill,
)

pytestmark = [
    *NEEDS_HOPPER,
    pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs the package flashinfer-python"),
]

BF16 = torch.bfloat16
DECODE, PREFILL = (
    next(kernel for kernel in OPERATIONS[operation] if kernel.name.startswith("flashinfer"))
    for operation in ("decode", "prefill")
)


def geometry(heads=16):
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def problem_of(shape, page_size=64, max_query_len=1):
    layout = CacheLayout(geometry=shape, format=format_of(BF16), page_size=page_size)
    return Problem(layout=layout, dtype=BF16, max_query_len=max_query_len)


def make(heads, seq_lens, page_size=64, **options):
    return make_decode(geometry(heads), seq_lens, page_size=page_size, dtype=BF16, device="cuda", **options)


def check_decode(case, scratch=None):
    """Into outputs full of NaN and with scratch that others have used."""
    q_latent, cache = case.arrays[0], case.arrays[2]
    problem = problem_of(case.geometry, cache.shape[1], case.options["query_len"])
    assert DECODE.unsupported(problem, device_of(cache)) == []
    shapes = DECODE.load().workspace(problem, device_of(cache), max_requests=len(case.arrays[4]))
    scratch = scratch or [torch.full(shape, 0x7F, dtype=dtype, device="cuda") for shape, dtype in shapes]
    out, lse = torch.full_like(q_latent, torch.nan), torch.full(q_latent.shape[:2], torch.nan, device="cuda")
    DECODE.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=scratch)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[BF16], case.magnitude())


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [0, 0], [15, 200, 16, 1, 130], [3000, 5]], ids=str)
def test_decode_lengths(seq_lens, page_size, needles):
    check_decode(make(16, seq_lens, page_size, needles=needles))


@pytest.mark.parametrize("heads", [1, 20, 128])
def test_decode_heads(heads):
    check_decode(make(heads, [129, 40, 1000], page_size=16))


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [([4, 5, 130, 64, 1000], 4), ([0, 2, 40], 4), ([5, 70, 1, 33], [5, 1, 1, 3]), ([5, 700, 9], [2, 0, 3])],
    ids=str,
)
def test_decode_of_several_query_tokens(seq_lens, query_lens, page_size):
    check_decode(make(16, seq_lens, page_size, query_lens=query_lens))


def test_decode_of_many_requests():
    check_decode(make(16, [(37 * i) % 300 for i in range(200)]))


def test_decode_in_strided_pages():
    check_decode(make(16, [129, 40, 700], page_gap=576))


def test_decode_by_several_plans(monkeypatch):
    """The second plan is written while the first one's kernel may run, in the same buffers."""
    monkeypatch.setattr(DECODE.load(), "_MOST_TILES", 4)
    check_decode(make(16, [2000, 90, 300, 5, 4000, 64], query_lens=[4, 4, 9, 1, 8, 1]))


def test_decode_again_and_again():
    """Each call plans anew in buffers that the call before used, with lengths that change in place."""
    case = make(16, [2000, 90, 300])
    scratch = [torch.empty(128 << 20, dtype=torch.uint8, device="cuda")]
    for _ in range(3):
        check_decode(case, scratch)
        case.arrays[4].sub_(29)


def test_decode_of_slices():
    """Rotary parts are slices of unabsorbed queries, once at addresses that FlashInfer would misread."""
    case = make(16, [40, 700])
    latent, rope, *rest = case.arrays
    for shift in (128, 4):
        wide = torch.full((*rope.shape[:2], 192 + shift), torch.nan, dtype=BF16, device="cuda")
        wide[..., shift : shift + 64] = rope
        arrays = (latent, wide[..., shift : shift + 64], *rest)
        check_decode(type(case)(geometry=case.geometry, arrays=arrays, options=case.options))


@pytest.mark.parametrize("operation", ["decode", "prefill"])
def test_no_graph_captures_it(operation):
    kernel, case = (DECODE, make(16, [40, 7])) if operation == "decode" else (PREFILL, prefill([4]))
    kernel.run(*case.arrays, **case.options)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="plans on the host"):
        kernel.run(*case.arrays, **case.options)


def prefill(*lens, heads=4, **options):
    return make_prefill(geometry(heads), *lens, dtype=BF16, device="cuda", **options)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("lens", [[1, 0, 16, 63], [64, 65], [127, 128, 129], [700, 3]], ids=str)
def test_prefill_causal(lens, needles):
    """FlashInfer rounds weights to bfloat16 before it divides by their sum: values of 4 are off by 4 times 2^-9."""
    assert PREFILL.unsupported(problem_of(geometry()), device_of("cuda")) == []
    case = prefill(lens, needles=needles)
    check_prefill(PREFILL.run, case, magnitude=case.magnitude())


@pytest.mark.parametrize("lens", [([5, 70], [67, 71]), ([70, 3, 66], [5, 1, 65]), ([65, 2], [128, 0])], ids=str)
def test_prefill_causal_over_other_numbers_of_keys(lens):
    check_prefill(PREFILL.run, prefill(*lens))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("key_lens", [[200, 64, 1, 5], [63, 0, 650, 0], [0, 0, 0, 0]], ids=str)
def test_prefill_over_all_keys(key_lens, accumulate):
    check_prefill(PREFILL.run, prefill([20, 3, 65, 0], key_lens, causal=False), accumulate=accumulate)


def test_prefill_of_many_heads_and_tokens():
    check_prefill(PREFILL.run, prefill([1500, 300], heads=20, needles=False))


def test_warm_up_loads_both():
    """What a server calls before it serves: a query that belongs to nobody, or to a request without keys."""
    case = make(16, [0], query_lens=[0])
    queries = [torch.zeros(1, 16, width, dtype=BF16, device="cuda") for width in (512, 64)]
    out, lse = DECODE.run(*queries, *case.arrays[2:], **case.options)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    nothing = prefill([0], heads=16)
    out, lse = PREFILL.run(torch.zeros(1, 16, 192, dtype=BF16, device="cuda"), *nothing.arrays[1:], **nothing.options)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
