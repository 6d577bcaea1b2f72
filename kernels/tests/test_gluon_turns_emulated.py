"""The text of Hopper decode for an fp8 cache and more than 32 query rows, executed on a CPU by gluon_emulator.py,
against the float64 reference."""

import pytest
import torch
from test_gluon_emulated import assert_seen, build, check, make, with_large_scores

from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

FP8 = {"cache_dtype": torch.float8_e4m3fn}
SCALED = {**FP8, "cache_scale": 0.037}


@pytest.fixture(scope="module")
def kernel():
    return build()


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [127, 129, 700], [15, 200, 16, 1, 130]], ids=str)
def test_lengths_around_every_edge(kernel, seq_lens, needles):
    check(kernel, make(40, seq_lens, needles=needles, **SCALED))


@pytest.mark.parametrize(("page_size", "page_gap"), [(1, 96), (16, 0), (48, 576), (128, 0)])
def test_pages(kernel, page_size, page_gap):
    lengths = [page_size + 1, max(page_size - 1, 1), 331]
    check(kernel, make(33, lengths, page_size=page_size, page_gap=page_gap, **FP8))


@pytest.mark.parametrize(("heads", "rope", "query_len"), [(64, 0, 1), (20, 64, 4), (65, 64, 1), (16, 64, [4, 1, 3])])
def test_rows(kernel, heads, rope, query_len):
    """One tile of 64 columns, two; the last one not full; uneven numbers of query tokens."""
    check(kernel, make(heads, [5, 130, 400], rope=rope, query_lens=query_len, **SCALED))


def test_query_tokens_before_the_sequence_see_nothing(kernel):
    check(kernel, make(16, [0, 2, 140], query_lens=4, **FP8))


def test_references_that_move(kernel):
    """In blocks of either warpgroup."""
    check(kernel, with_large_scores(48, **FP8))


def with_scores_near(score):
    """Every reference is far from the one that a piece begins with."""
    case = make(40, [300, 70], needles=False, **FP8)
    _, q_rope, cache_AGK, _, _ = case.arrays
    cache_AGK[..., 512:] = torch.ones(64).to(cache_AGK.dtype)
    q_rope[:] = score / 64 / case.options["scale"]
    return case


@pytest.mark.parametrize("score", [-1000.0, 1000.0])
def test_scores_far_from_zero(kernel, score):
    check(kernel, with_scores_near(score))


def with_no_numbers_behind_tokens():
    case = make(40, [4, 100], page_size=128, needles=False, **FP8)
    cache_AGK, table = case.arrays[2].view(torch.uint8), case.arrays[3]
    cache_AGK[table[1, 0], 100:] = 0x7F
    cache_AGK[table[0, 0], 4:] = 0xFF
    return case


def test_codes_that_are_no_numbers(kernel):
    """They stay what they are where a request has them, and spoil nothing where it has none."""
    case = with_no_numbers_behind_tokens()
    check(kernel, case)
    cache_AGK, table = case.arrays[2].view(torch.uint8), case.arrays[3]
    cache_AGK[table[0, 0], 1, 77] = 0x7F
    out, _ = kernel.run(*case.arrays, **case.options)
    assert out[0, :, 77].isnan().all()
    assert not out[1].isnan().any()


def test_an_infinite_query_spoils_its_own_row_alone(kernel):
    case = make(40, [200, 30], needles=False, **FP8)
    case.arrays[0][0, 1, 7] = torch.inf
    out, lse = kernel.run(*case.arrays, **case.options)
    expected, expected_lse = case.reference()
    others = [head for head in range(40) if head != 1]
    assert_matches("lse", lse[:, others], expected_lse[:, others], LSE_TOLERANCE)
    assert_matches("out", out[:, others], expected[:, others], TOLERANCE[torch.float16], case.magnitude()[:, others])


def all_forms(kernel):
    check(kernel, make(50, [700, 30], query_lens=2, page_size=48, **SCALED))
    check(kernel, make(40, [700, 130, 70], query_lens=[2, 1, 1], **SCALED))
    check(kernel, make(40, [100] * 11, **SCALED))  # parts of several pieces
    check(kernel, with_large_scores(48, **FP8))
    check(kernel, with_scores_near(-1000.0))
    check(kernel, with_no_numbers_behind_tokens())


POSITION = "gl.arange(0, BLOCK, gl.SliceLayout(1, TILE_LAYOUT))"
WRITE = "r = token * N + row0 + i\n        at_row = (r // N).to(gl.int64) * stride_out_t"
LAST = "store_tile(acc2 * last, acc3 * last, column + HALF // 2"
MISTAKES = {
    "the scale is left out of scores": ("* cache_scale * gl.max(smem.power", "* gl.max(smem.power"),
    "powers of queries are left out of scores": (" * gl.max(smem.power.load(one), 0)", ""),
    "the scale is left out of outputs": ("last = (cache_scale / safe)", "last = (1.0 / safe)"),
    "a query sees one key too many": (POSITION, f"{POSITION} - 1"),
    "rows of later tiles see what the first one's do": (
        "row = row0 + (uniform(block) >> 30) + gl.arange(0, Q",
        "row = gl.arange(0, Q",
    ),
    "what is behind the last token is added": (
        "position = b * BLOCK + at + gl.arange(0, KEYS, gl.SliceLayout(1, lay))",
        "position = gl.arange(0, KEYS, gl.SliceLayout(1, lay)) - 999",
    ),
    "references stay as they are": ("[4], [0])), 0) > LAZY", "[4], [0])), 0) > 1e9"),
    "sums are not rescaled for an own block": (
        "total = rescale_sums(total, smem.factor",
        "rescale_sums(total, smem.factor",
    ),
    "sums are not rescaled for the other's": ("total = rescale_sums(total, rescale)", "pass"),
    "outputs are not rescaled": (
        "rescale = smem.factor.index(whose).load(QUERY)",
        "rescale = smem.factor.index(whose).load(QUERY) * 0 + 1",
    ),
    "a first block's factor is infinite": ("gl.exp2(-gl.maximum(by, 0.0))", "gl.exp2(-by)"),
    "a block has the other's weights": ("weight = smem.weight.index(whose)", "weight = smem.weight.index(1 - whose)"),
    "both warpgroups add the first half": (
        "values = smem.k.index(2 * stage + turn)",
        "values = smem.k.index(2 * stage)",
    ),
    "both write the first half": ("column = turn * HALF", "column = 0 * HALF"),
    "the last rows' columns are shifted": (LAST, LAST.replace(" + HALF // 2", "")),
    "every tile writes where the first one does": (WRITE, WRITE.replace("row0 + ", "")),
    "a piece's last block is left out": ("if added < end:", "if False:"),
    "sums are one warpgroup's": ("return first + second", "return first"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    assert_seen(MISTAKES[mistake], build, all_forms, monkeypatch)
