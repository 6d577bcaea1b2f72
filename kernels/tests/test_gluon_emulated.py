"""The text of the Hopper decode kernel, executed on a CPU by gluon_emulator.py, against the float64 reference."""

from unittest.mock import patch

import gluon_emulator
import pytest
import torch
from gluon_emulator import emulated

import mla_kernels.primitives as primitives
import mla_kernels.split_merge as split_merge
import mla_kernels.splits as splits
from mla_kernels import Device, MLAGeometry
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode

MODULES = (
    *("hopper", "tma", "schedule", "hopper_load", "hopper_unpack", "hopper_shrink", "hopper_shared", "hopper_decode"),
    *("hopper_columns", "hopper_codes_load", "hopper_codes", "hopper_few", "hopper_turns", "hopper_launch"),
    *("hopper_few_launch", "hopper_codes_launch", "hopper_tiles", "hopper_tiles_launch", "decode.gluon_sm90"),
)
TWO_AND_A_BIT = 0x40100000  # 2.25 as an integer: scratch holds what others left, such as floats
GPU = Device("cuda", 90, "a small Hopper", 5)
HERE = {"overlap": False, "device": Device("cpu", interpreted=True)}  # where merging runs


def merge_parts(out, *args, **options):
    """In float32 where answers are bfloat16, with which the interpreter computes wrongly. Many rows at once: how many
    changes nothing, and programs are what takes time there."""
    exact = out.float() if out.dtype == torch.bfloat16 else out
    with patch.object(split_merge, "merge_form", lambda *_: (8, 32, 512)):
        split_merge.merge_parts(exact, *args, **options | {"overlap": False})
    out.copy_(exact)


def build(few_rows: int = 0, **edits):
    """few_rows: up to which products are transposed. Nowhere: test_gluon_few_emulated.py has those."""
    modules = dict(zip(MODULES, emulated(*(f"mla_kernels.{name}" for name in MODULES), **edits), strict=True))
    modules["hopper_decode"].LN_2 = primitives.LN_2.value
    launch, kernel = modules["hopper_launch"], modules["decode.gluon_sm90"]
    kernel._FEW_ROWS = few_rows
    launch.device_of = lambda tensor: GPU
    kernel.in_16_bytes = launch.in_16_bytes
    kernel.merge_parts = merge_parts
    kernel.merge_splits = lambda *args, **options: splits.merge_splits(*args, **options | HERE)
    return kernel


@pytest.fixture(scope="module")
def kernel():
    return build()


PACKED = {"cache_dtype": torch.uint8}
CACHES = {"float16": {}, "packed": PACKED}


@pytest.fixture(params=CACHES)
def cache(request):
    return CACHES[request.param]


def make(heads, seq_lens, *, rope=64, page_size=64, dtype=torch.float16, **options):
    geometry = MLAGeometry(
        num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128
    )
    return make_decode(geometry, seq_lens, page_size=page_size, dtype=dtype, **options)


def check(kernel, case):
    q_latent = case.arrays[0]
    out, lse = torch.full_like(q_latent, torch.nan), torch.full(q_latent.shape[:2], torch.nan)
    rows = case.options["query_len"] * case.geometry.num_heads
    height = kernel._height(rows, case.geometry.num_heads)
    workspace = tuple(
        torch.full(shape, TWO_AND_A_BIT if dtype == torch.int32 else torch.nan, dtype=dtype)
        for shape, dtype in kernel.scratch_shapes(kernel.scratch_rows(rows, height, GPU), GPU)
    )
    kernel.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=workspace)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q_latent.dtype], case.magnitude())


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [700], [15, 200, 16, 1, 130]], ids=str)
def test_lengths_around_every_edge(kernel, seq_lens, needles, cache):
    check(kernel, make(5, seq_lens, needles=needles, **cache))


@pytest.mark.parametrize("page_gap", [0, 576, 96], ids=["dense", "tma", "gather"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128])
def test_pages(kernel, page_size, page_gap, cache):
    lengths = [page_size + 1, max(page_size - 1, 1), 331]
    check(kernel, make(3, lengths, page_size=page_size, page_gap=page_gap, **cache))


@pytest.mark.parametrize(("heads", "rope", "query_len"), [(1, 0, 1), (20, 64, 4), (65, 64, 1), (128, 64, 2)])
def test_rows(kernel, heads, rope, query_len, cache):
    """One tile of query rows, two, four; the last one not full."""
    check(kernel, make(heads, [query_len + 1, 130, 400], rope=rope, query_lens=query_len, **cache))


def test_few_rows_are_columns(kernel):
    """Up to 32 of them, other bits than as rows; more have the same."""

    def bits(kernel, case):
        return kernel.run(*case.arrays, **case.options)

    whole = build(few_rows=kernel.COLUMNS[-1])
    for heads, query_len, transposed in ((16, 1, True), (8, 4, True), (11, 3, False)):
        case = make(heads, [130, 400], query_lens=query_len)
        check(whole, case)
        equal = [torch.equal(*pair) for pair in zip(bits(kernel, case), bits(whole, case), strict=True)]
        assert all(equal) != transposed, (heads, query_len)


def with_large_scores(heads=16, **options):
    """Scores that grow by more than the softmax lets its reference lag behind, again and again."""
    case = make(heads, [1400, 30], **options)
    case.options["scale"] *= 8
    return case


def test_large_scores(kernel, cache):
    check(kernel, with_large_scores(**cache))


def test_query_tokens_before_the_sequence_see_nothing(kernel, cache):
    check(kernel, make(16, [0, 2, 140], query_lens=4, **cache))


@pytest.mark.parametrize("query_lens", [[5, 1, 1, 3], [2, 0, 3, 0]], ids=str)
def test_ragged(kernel, query_lens, cache):
    check(kernel, make(30, [5, 270, 1, 333], query_lens=query_lens, **cache))


def test_more_requests_than_are_looked_at_at_once(kernel):
    check(kernel, make(2, [1 + (i * 37) % 90 for i in range(140)], page_size=16))


def test_few_large_parts(kernel):
    """Parts of 16 blocks and more look for a size that cuts fewer requests."""
    check(kernel, make(2, [3000, 1000, 1100]))


def test_one_long_request_among_short_ones(kernel):
    check(kernel, make(16, [3, 1500, 1, 30, 64]))


def test_strided_queries_misaligned_too(kernel):
    case = make(4, [40, 300])
    latent, rope, *rest = case.arrays
    wide = torch.full((*latent.shape[:2], 801), torch.nan, dtype=latent.dtype)
    wide[..., 3:515], wide[..., 600:664] = latent, rope
    odd = torch.empty(rope.numel() + 1, dtype=rope.dtype)[1:].view(rope.shape).copy_(rope)  # contiguous, not aligned
    for q_rope in (wide[..., 600:664], odd):
        arrays = (wide[..., 3:515], q_rope, *rest)
        check(kernel, type(case)(geometry=case.geometry, arrays=arrays, options=case.options))
    assert kernel.in_16_bytes(odd).data_ptr() % 16 == 0


def both(kernel):
    check(kernel, make(5, [700, 30], query_lens=2))
    check(kernel, with_large_scores())


# Barriers matter only if somebody is late.
LATE = {
    "outputs' last factor is read late": ("    last = smem.last.load(", "last_empty"),
    "outputs' last factor is written late": ("    smem.last.store(", "last_full"),
}


@pytest.mark.parametrize("what", LATE)
def test_late_roles_are_waited_for(what, monkeypatch):
    """With many short requests: right while the barrier is there, wrong without."""
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 3)
    line, barrier = LATE[what]
    late = {line: f"    __import__('time').sleep(0.01)\n{line}"}
    case = make(3, [5, 30, 1, 64, 9, 70, 2, 11] * 3)
    check(build(edits=late), case)
    waits = {
        "last_empty": "    mbarrier.wait(smem.last_empty, (pieces & 1) ^ 1)\n",
        "last_full": "    mbarrier.wait(smem.last_full, pieces & 1)\n",
    }
    with pytest.raises(AssertionError):
        check(build(edits=late | {waits[barrier]: ""}), case)


MISTAKES = {
    "rows past the end are not zeroed": ("            _zero_tail(smem.k", "            (lambda *_: 0)(smem.k"),
    "a query sees one key too many": ("sees = seq_len - tokens + (", "sees = seq_len - tokens + 1 + ("),
    "weights are not made anew when scores grow": ("    if grew > 0:", "    if grew > 1:"),
    "outputs are not rescaled": ("if gl.max(smem.grew.load(flag_lay), 0) > 0:", "if False:"),
    "two pieces in one slot": ("2 * part + 1, -1)", "2 * part, -1)"),
    "pages in the wrong order": ("                page0 = page1", "                page0 = page2"),
    "a block is never released": ("    mbarrier.arrive(smem.k_empty.index(2 * stage + 1), count=1)", "    pass"),
    "the last rows' columns are shifted": ("_store(acc1, out_ptr + HALF,", "_store(acc1, out_ptr,"),
}


def assert_seen(mistake, build, work, monkeypatch, errors=(AssertionError, IndexError)):
    """The emulator is no rubber stamp: with this edit of the kernel's text the work fails."""
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 1)
    broken = build(edits=dict([mistake]))
    with pytest.raises(errors):
        work(broken)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    assert_seen(MISTAKES[mistake], build, both, monkeypatch, errors=AssertionError)
