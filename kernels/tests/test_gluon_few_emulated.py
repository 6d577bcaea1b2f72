"""The text of the Hopper decode kernel where products are transposed or the cache is fp8, executed on a CPU by
gluon_emulator.py, against the float64 reference."""

import functools

import pytest
import torch
from test_gluon_emulated import assert_seen, check, make, with_large_scores
from test_gluon_emulated import build as build_for

from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

FP8 = {"cache_dtype": torch.float8_e4m3fn}
build = functools.partial(build_for, few_rows=32)


@pytest.fixture(scope="module")
def kernel():
    return build()


PACKED = {"cache_dtype": torch.uint8}
SCALED = {**FP8, "cache_scale": 0.037}
CACHES = {"float16": {}, "fp8": FP8, "fp8 with a scale": SCALED}


@pytest.fixture(params=CACHES)
def cache(request):
    return CACHES[request.param]


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [700], [15, 200, 16, 1, 130]], ids=str)
def test_lengths_around_every_edge(kernel, seq_lens, needles, cache):
    check(kernel, make(5, seq_lens, needles=needles, **cache))


@pytest.mark.parametrize("page_gap", [0, 576, 96], ids=["dense", "tma", "gather"])
@pytest.mark.parametrize("page_size", [1, 16, 48, 128])
def test_pages(kernel, page_size, page_gap, cache):
    lengths = [page_size + 1, max(page_size - 1, 1), 331]
    check(kernel, make(3, lengths, page_size=page_size, page_gap=page_gap, **cache))


@pytest.mark.parametrize(("heads", "rope", "query_len"), [(1, 0, 1), (16, 64, 1), (17, 64, 1), (8, 0, 4), (32, 64, 1)])
def test_rows(kernel, heads, rope, query_len, cache):
    check(kernel, make(heads, [query_len + 1, 130, 400], rope=rope, query_lens=query_len, **cache))


@pytest.mark.parametrize(("heads", "rope", "query_len"), [(33, 64, 1), (20, 64, 4), (128, 0, 1)])
@pytest.mark.parametrize("cache", [SCALED, PACKED], ids=["fp8 with a scale", "packed"])
def test_several_tiles_of_rows(kernel, heads, rope, query_len, cache):
    """Of an fp8 cache; the last one not full."""
    check(kernel, make(heads, [query_len + 1, 130, 400], rope=rope, query_lens=query_len, **cache))


def test_any_scale_of_packed_rows_is_read(kernel):
    """vLLM before its pull request 49435 wrote amax / 448 as it was."""
    case = make(40, [40, 130], **PACKED)
    scales = case.arrays[2][..., 512:528].view(torch.float32)
    scales *= 0.5 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(0))
    check(kernel, case)


@pytest.mark.parametrize("heads", [1, 40])
def test_every_code_of_packed_rows(kernel, heads):
    """With scales of several sizes; NaN stays NaN, in codes and in scales. In either path."""
    case = make(heads, [4], page_size=64, needles=False, **PACKED)
    q_latent, q_rope, cache_AGK, table, _ = case.arrays
    codes = torch.arange(512).remainder(256).to(torch.uint8)
    not_a_number = (codes & 0x7F) == 0x7F
    page = int(table[0, 0])
    cache_AGK[page, :4] = 0
    cache_AGK[page, 2, :512] = codes
    scales = torch.tensor([2.0**-13, 1.0, 8.0, torch.nan])
    cache_AGK[page, 2, 512:528] = scales.view(torch.uint8)
    cache_AGK[page, 2, 528:530] = torch.tensor([64.0], dtype=torch.bfloat16).view(torch.uint8)
    q_latent[:], q_rope[:] = 0, 0
    q_rope[..., 0] = 8.0  # a score of 37 beside zeros
    out, _ = kernel.run(*case.arrays, **case.options)
    assert out.isnan().all(), "a key that is no number has a score that is none"
    cache_AGK[page, 2, :512][not_a_number] = 0
    cache_AGK[page, 2, 524:528] = torch.tensor([2.0**-3]).view(torch.uint8)
    out, _ = kernel.run(*case.arrays, **case.options)
    scales[3] = 2.0**-3
    wanted = cache_AGK[page, 2, :512].view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128)
    assert torch.equal(out[0], wanted.to(out.dtype).expand(heads, -1))


def test_large_scores(kernel, cache):
    check(kernel, with_large_scores(**cache))


def test_query_tokens_before_the_sequence_see_nothing(kernel, cache):
    check(kernel, make(5, [0, 2, 140], query_lens=4, **cache))


@pytest.mark.parametrize("query_lens", [[5, 1, 1, 3], [2, 0, 3, 0]], ids=str)
def test_ragged(kernel, query_lens, cache):
    check(kernel, make(6, [5, 270, 1, 333], query_lens=query_lens, **cache))


def test_more_requests_than_are_looked_at_at_once(kernel):
    check(kernel, make(2, [1 + (i * 37) % 90 for i in range(140)], page_size=16, **FP8))


def test_one_long_request_among_short_ones(kernel, cache):
    check(kernel, make(16, [3, 1500, 1, 30, 64], **cache))


def test_every_code_is_the_value_that_torch_says(kernel):
    """A query that looks at one key only reads out that key's codes."""
    case = make(1, [4], rope=0, page_size=64, needles=False, **FP8)
    q_latent, _, cache_AGK, table, _ = case.arrays
    codes = torch.arange(512).remainder(256).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN: below
    page = int(table[0, 0])
    cache_AGK[page, :4] = torch.zeros(4, 512).to(cache_AGK.dtype)
    cache_AGK[page, 2] = codes.view(torch.float8_e4m3fn)
    q_latent[:] = 0
    q_latent[0, 0, 126] = 1.0  # code 126 is 448: a score of 32 beside zeros
    out, _ = kernel.run(*case.arrays, **case.options)
    assert torch.equal(out[0, 0], codes.view(torch.float8_e4m3fn).to(out.dtype))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_stays_one(kernel, code):
    case = make(1, [4], needles=False, **FP8)
    cache_AGK, page = case.arrays[2], int(case.arrays[3][0, 0])
    cache_AGK.view(torch.uint8)[page, 1, 77] = code
    out, _ = kernel.run(*case.arrays, **case.options)
    assert out[0, 0, 77].isnan()


@pytest.mark.parametrize("magnitude", [2.0**-13, 2.0**-7, 1.0, 2.0**7], ids=str)
def test_queries_of_any_magnitude(kernel, magnitude):
    """Of heads that differ by a factor of 8, in a format that ends at 2^16 and gets coarse below 2^-14."""
    for query_len in (1, 12):
        case = make(3, [200, 30], needles=False, query_lens=query_len, **FP8)
        for part in case.arrays[:2]:
            part.mul_(magnitude * torch.tensor([1.0, 8.0, 64.0])[:, None]).clamp_(-60000, 60000)
        case.options["scale"] /= 64 * magnitude
        check(kernel, case)


def test_an_infinite_query_spoils_its_own_row_alone(kernel):
    case = make(3, [200, 30], needles=False, **FP8)
    case.arrays[0][0, 1, 7] = torch.inf
    out, lse = kernel.run(*case.arrays, **case.options)
    expected, expected_lse = case.reference()
    others = [0, 2]
    assert_matches("lse", lse[:, others], expected_lse[:, others], LSE_TOLERANCE)
    assert_matches("out", out[:, others], expected[:, others], TOLERANCE[torch.float16], case.magnitude()[:, others])


def check_fixed_splits(kernel):
    case = make(20, [300, 70], query_lens=4)
    out, lse = kernel.run(*case.arrays, **case.options, split_tokens=128)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float16], case.magnitude())


def test_fixed_splits_of_several_tiles(kernel):
    """Of 80 query rows of 20 heads, which are columns then."""
    check_fixed_splits(kernel)


def both(kernel):
    check(kernel, make(3, [700, 30], query_lens=2, page_size=48, **CACHES["fp8 with a scale"]))
    check(kernel, make(10, [700, 30], query_lens=[4, 3], page_size=48, **CACHES["fp8 with a scale"]))
    check(kernel, make(50, [200, 30], query_lens=2, **CACHES["fp8 with a scale"]))
    check(kernel, make(40, [700, 30], page_size=48, **PACKED))
    check(kernel, make(3, [700, 30], **CACHES["fp8"]))
    check(kernel, with_large_scores())
    check(kernel, with_large_scores(**FP8))
    check_fixed_splits(kernel)


NEXT_PACKED = "row = _row_of(cache, next_page, b + 1, t, PAGE)\n                    real"
SCALE = "factor = scale_log2 * cache_scale\n            if CODES"
LAST = "sum_of_row, 1.0)\n    mbarrier.wait(smem.last_empty, (pieces & 1) ^ 1)\n    smem.last.store(cache_scale"
READ, STORE = "    r = token * N + row0 + i\n    offset", "gl.SliceLayout(0, lay))\n    r = token * N + row0 + i"
ORDER = "words.reshape([F, TILE // 16, 4, 2]).permute((0, 1, 3, 2))"
MISTAKES = {
    "the scale is left out of scores": (SCALE, SCALE.replace("* cache_scale", "* 1.0")),
    "powers of queries are left out of scores": ("factor *= shrink_q", "shrink_q"),
    "the scale is left out of outputs": (LAST, LAST.replace("cache_scale", "1.0")),
    "a query sees one key too many": ("first_query + row // N", "first_query + 1 + row // N"),
    "a part sees what is behind its last block": ("known = gl.minimum(seq_len, end * BLOCK)  #", "known = seq_len  #"),
    "a part adds what is behind its last block": ("known = gl.minimum(seq_len, end * BLOCK)\n", "known = seq_len\n"),
    "sums are not rescaled": ("total = total * rescale[None, :]", "pass"),
    "outputs are not rescaled": ("        rescale = smem.factor.load(query_lay)[None, :]", "        rescale = 1.0"),
    "outputs of codes are not rescaled": (
        "rescale = smem.factor.load(gl.SliceLayout(0, o_lay))[None, :]",
        "rescale = 1.0",
    ),
    "columns of queries are not in the order of keys'": (ORDER, ORDER.replace("3, 2))", "2, 3))")),
    "columns of a word change places": ("0x7362", "0x5140"),
    "a step's blocks come from one page": (
        "pages[u], seq_len, table, cache, smem, stage",
        "pages[0], seq_len, table, cache, smem, stage",
    ),
    "a step's second block has the weights of the first": ("smem.weight.slice(u * BLOCK", "smem.weight.slice(0"),
    "a step's second block has the values of the first": (
        ".slice(u * BLOCK, BLOCK, dim=0).load(VALUES)",
        ".slice(0, BLOCK, dim=0).load(VALUES)",
    ),
    "packed codes of the wrong block": (NEXT_PACKED, NEXT_PACKED.replace("b + 1", "b")),
    "every tile's scale is the first one's": ("_scale(row, 2 * half + 1, real)", "_scale(row, 2 * half, real)"),
    "rotary values of packed rows are read as float16": ("if buffer.dtype == gl.float16:", "if False:"),
    "the last rows' columns are shifted": (
        "_write_half(acc2 * last, acc3 * last, 1",
        "_write_half(acc2 * last, acc3 * last, 0",
    ),
    "every tile reads the first one's queries": (READ, READ.replace("row0 + ", "")),
    "every tile writes where the first one does": (STORE, STORE.replace("row0 + ", "")),
    "rows of later tiles see what the first one's do": ("row = row0 + (uniform", "row = (uniform"),
    "every tile's LSE goes to the first one's": ("rows_per_slot + row0 + i, row_lse", "rows_per_slot + i, row_lse"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    assert_seen(MISTAKES[mistake], build, both, monkeypatch)
