"""The text of Hopper decode for tile-scaled rows and up to 32 query rows, executed on a CPU by gluon_emulator.py,
against the float64 reference."""

import functools
import math

import pytest
import torch
from test_gluon_emulated import assert_seen, check, with_large_scores
from test_gluon_emulated import build as build_for
from test_gluon_emulated import make as make_for

build = functools.partial(build_for, few_rows=32)
make = functools.partial(make_for, cache_dtype=torch.uint8)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
LATENT = 512


@pytest.fixture(scope="module")
def kernel():
    return build()


@DTYPES
@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize(
    "seq_lens", [[1, 0, 17], [63, 64, 65], [127, 129, 700], [15, 200, 16, 1, 130], [3, 1500, 1, 30, 64]], ids=str
)
def test_lengths_around_every_edge(kernel, seq_lens, needles, dtype):
    check(kernel, make(5, seq_lens, needles=needles, dtype=dtype))


@pytest.mark.parametrize("page_gap", [0, 656, 96], ids=["dense", "tma", "gather"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128])
def test_pages(kernel, page_size, page_gap):
    check(kernel, make(20, [page_size + 1, max(page_size - 1, 1), 331], page_size=page_size, page_gap=page_gap))


@DTYPES
@pytest.mark.parametrize(("heads", "rope", "query_len"), [(1, 0, 1), (16, 64, 1), (17, 64, 1), (8, 0, 4), (32, 64, 1)])
def test_rows(kernel, heads, rope, query_len, dtype):
    check(kernel, make(heads, [query_len + 1, 130, 400], rope=rope, query_lens=query_len, dtype=dtype))


@pytest.mark.parametrize("query_lens", [[5, 1, 1, 3], [2, 0, 3, 0]], ids=str)
def test_ragged(kernel, query_lens):
    check(kernel, make(6, [5, 270, 1, 333], query_lens=query_lens))
    check(kernel, make(3, [5, 270, 1, 333], query_lens=query_lens, page_size=16, rope=0))


def test_query_tokens_before_the_sequence_see_nothing(kernel):
    check(kernel, make(5, [0, 2, 140], query_lens=4))


def test_large_scores(kernel):
    check(kernel, with_large_scores(cache_dtype=torch.uint8))


def scales_of(case):
    """[pages, tokens, 4], in place."""
    return case.arrays[2][..., LATENT : LATENT + 16].view(torch.float32)


def by_token(case, request):
    """(page, offset) of each of a request's tokens."""
    token = torch.arange(int(case.arrays[4][request]))
    size = case.arrays[2].shape[1]
    return case.arrays[3][request, token // size].long(), token % size


@pytest.mark.parametrize("heads", [5, 20])
def test_any_scale_is_read(kernel, heads):
    """vLLM before its pull request 49435 wrote amax / 448 as it was. Negative ones nobody writes."""
    case = make(heads, [40, 130])
    scales = scales_of(case)
    generator = torch.Generator().manual_seed(0)
    scales *= (0.5 + torch.rand(scales.shape, generator=generator)) * torch.randn(scales.shape, generator=generator)
    check(kernel, case)


@pytest.mark.parametrize("power", [-60, 60])
def test_values_that_float16_cannot_hold(kernel, power):
    case = make(16, [140, 3], needles=False, dtype=torch.bfloat16)
    scales_of(case).mul_(2.0**power)
    case.arrays[0].mul_(2.0**-power)
    check(kernel, case)


def with_scales_that_grow(heads=16):
    """From 2^-16 to 2^5 within a part, by more than weights have room for, differently from tile to tile."""
    case = make(heads, [1400, 30], needles=False)
    scales = scales_of(case)
    for request in range(2):
        page, offset = by_token(case, request)
        order = 4 * (torch.arange(len(page)) // 64 % 5)[:, None] + torch.tensor([0, 3, -2, 1])
        scales[page, offset] = 2.0 ** (order - 14)
    for queries in case.arrays[:2]:
        queries.zero_()  # no reference of the softmax moves, and every token counts
    return case


def test_scales_that_grow(kernel):
    check(kernel, with_scales_that_grow())


@pytest.mark.parametrize("scales", [[2.0**-12, 1.0, 2.0**-20, 2.0**-6], [-(2.0**-3)] * 4], ids=str)
def test_scales_of_tiles_that_differ(kernel, scales):
    """The largest may be any tile's, and all may be negative."""
    case = make(16, [600, 30], needles=False)
    scales_of(case)[:] = torch.tensor(scales)
    for queries in case.arrays[:2]:
        queries.zero_()
    check(kernel, case)


def with_weights_as_large_as_can_be():
    """Scores up to which no reference moves, from the second step on, times scales up to which no power does."""
    case = make(16, [600, 30], needles=False, dtype=torch.bfloat16)
    q_latent, q_rope, cache_AGK, _, _ = case.arrays
    q_latent[:], q_rope[:] = 0, 0
    q_rope[..., 0] = 1.0
    rope = cache_AGK[..., LATENT + 16 :].view(torch.bfloat16)
    rope[..., 0] = 0
    page, offset = (x[128:] for x in by_token(case, 0))
    rope[page, offset, 0] = 7.75 * math.log(2) / case.options["scale"]
    scales_of(case)[:] = 1.99
    return case


def test_weights_as_large_as_can_be(kernel):
    check(kernel, with_weights_as_large_as_can_be())


def test_a_scale_that_falls_is_not_lost(kernel):
    """What all queries look at has scales of 2^-12 of the others', before it and behind it."""
    for place in (0, 70, 199):
        case = make(20, [200, 20], needles=False)
        q_latent, q_rope, cache_AGK, _, _ = case.arrays
        page, offset = (x[place] for x in by_token(case, 0))
        scales = scales_of(case)
        scales.mul_(2.0**14)
        scales[page, offset] *= 2.0**-12
        q_latent[:], q_rope[:] = 0, 0
        q_rope[..., 0] = 8.0
        rope = cache_AGK[..., LATENT + 16 :].view(torch.bfloat16)
        rope[..., 0] = 0
        rope[page, offset, 0] = 64.0  # a score of 37 beside zeros
        check(kernel, case)


@pytest.mark.parametrize("what", ["code", "scale", "infinite scale", "scale of an infinite value", "rope"])
@pytest.mark.parametrize("token", [1, 300])
def test_what_is_no_number_stays_in_its_request(kernel, what, token):
    """In a request that is cut: its answers are no numbers, those of others what they are without it."""
    case = make(5, [30, 700, 65], needles=False)
    cache_AGK = case.arrays[2]
    page, offset = (x[token] for x in by_token(case, 1))
    at, value = {
        "code": (77, torch.tensor([0x7F], dtype=torch.uint8)),
        "scale": (LATENT + 8, torch.tensor([torch.nan])),
        "infinite scale": (LATENT + 8, torch.tensor([torch.inf])),
        "scale of an infinite value": (LATENT + 8, torch.tensor([2.0**120])),
        "rope": (LATENT + 16, torch.tensor([torch.nan], dtype=torch.bfloat16)),
    }[what]
    wanted, wanted_lse = kernel.run(*case.arrays, **case.options)
    value = value.view(torch.uint8)
    cache_AGK[page, offset, at : at + len(value)] = value
    out, lse = kernel.run(*case.arrays, **case.options)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], wanted[[0, 2]])
    assert torch.equal(lse[[0, 2]], wanted_lse[[0, 2]])


def test_scales_of_zero(kernel):
    """Values are zero then, whatever codes are."""
    case = make(5, [30, 300])
    page, offset = by_token(case, 0)
    scales_of(case)[page, offset] = 0
    page, offset = (x[:200] for x in by_token(case, 1))
    scales_of(case)[page, offset] = 0
    check(kernel, case)


@DTYPES
def test_rotary_values_of_queries_keep_their_bits(kernel, dtype):
    """float16 has more of them than the cache's bfloat16. A score of 1 is one of several hundred, less the others."""
    case = make(3, [40], needles=False, dtype=dtype)
    _, q_rope, cache_AGK, _, _ = case.arrays
    q_rope[..., ::2] = 1001.0
    q_rope[..., 1::2] = -1000.0
    cache_AGK[..., LATENT + 16 :].view(torch.bfloat16)[:] = 0.5
    q_rope[..., :40] = 0
    check(kernel, case)


@pytest.mark.parametrize("magnitude", [2.0**-13, 2.0**-7, 1.0, 2.0**7], ids=str)
def test_queries_of_any_magnitude(kernel, magnitude):
    """Of heads that differ by a factor of 8, in a format that ends at 2^16 and gets coarse below 2^-14."""
    for query_len in (1, 10):
        case = make(3, [200, 30], needles=False, query_lens=query_len)
        for part in case.arrays[:2]:
            part.mul_(magnitude * torch.tensor([1.0, 8.0, 64.0])[:, None]).clamp_(-60000, 60000)
        case.options["scale"] /= 64 * magnitude
        check(kernel, case)


def both(kernel):
    check(kernel, make(3, [700, 30], query_lens=2, page_size=48))
    check(kernel, make(8, [700, 30], query_lens=[4, 3]))
    check(kernel, make(20, [700, 30], page_size=48))
    check(kernel, make(16, [100] * 11))  # parts of several pieces
    check(kernel, make(16, [2000, 30], page_size=48))  # buffers are filled again, row by row
    check(kernel, with_large_scores(cache_dtype=torch.uint8))
    check(kernel, with_scales_that_grow())
    check(kernel, with_scales_that_grow(20))


SEES = '<= sees[None, :], s, float("-inf"))\n        scale0'
KNOWN = """known = gl.minimum(seq_len, end * BLOCK)  # what is behind a piece is another part's
            seen = (seq_len - tokens, known, gl.minimum(seq_len - tokens + 1, known))
            top"""
ADDED = "known = gl.minimum(seq_len, end * BLOCK)\n            nothing = gl.zeros([HALF // 4"
RESCALED = """values, known, KEYS, STEP_KEYS)
    mbarrier.wait(smem.weight_full, step & 1)
    if gl.max(smem.grew.load(flag_lay), 0) > 0"""
BEHIND = "gl.where(position < known, scale2, 0.0)"
LAST = "column + HALF // 2, slot, out, row0, rows, token, N, F)"
GROWTH = " | (scale * shrink > 2.0**ORDERS)[:, None]"
MISTAKES = {
    "powers of queries are left out of scores": ("s), power, r)", "s), 1.0, r)"),
    "rotary values are left out of scores": ("s), power, r)", "s), power, 0.0)"),
    "the rest of rotary values is left out": ("q_rope_s.index(zero + 1)", "q_rope_s.index(zero)"),
    "scales change places": ("x0, x2 = gl.split(even)", "x2, x0 = gl.split(even)"),
    "the last tile has another's scale": ("key_lay)[3]", "key_lay)[2]"),
    "a query sees one key too many": (SEES, SEES.replace("sees[", "1 + sees[")),
    "a part sees what is behind its last block": (KNOWN, KNOWN.replace("gl.minimum(seq_len, end * BLOCK)", "seq_len")),
    "a part adds what is behind its last block": (ADDED, ADDED.replace("gl.minimum(seq_len, end * BLOCK)", "seq_len")),
    "scales behind the end count": (BEHIND, "scale2"),
    "scales stay as they are": (GROWTH, ""),
    "outputs are not rescaled when scales grow": ("rescale * (new_shrink / shrink)", "rescale"),
    "the scales' power is left out of outputs": ("sum_of_query, top, 1.0 / shrink", "sum_of_query, top, 1.0"),
    "outputs are not rescaled": (RESCALED, RESCALED.replace("> 0", "> 1")),
    "sums are not rescaled": ("total = rescale_sums(total, rescale)\n        top", "top"),
    "a tile has another's weights": ("smem.weight[2 * half + 1]", "smem.weight[2 * half]"),
    "both halves have the first one's weights": ("smem.weight[2 * half].", "smem.weight[0]."),
    "both add the first half": ("values = smem.k.index(2 * stage + half)", "values = smem.k.index(2 * stage)"),
    "both write the first half": ("column = half * HALF", "column = 0"),
    "the last columns are shifted": (LAST, LAST.replace(" + HALF // 2", "")),
    "a step's second block has the values of the first": ("words_of_tile(b, at, 1,", "words_of_tile(b, 0, 1,"),
    "rotary values of the wrong bytes": ("[row, LATENT + SCALES]", "[row, LATENT]"),
    "rows read one by one have rotary values of the wrong bytes": ("(LATENT + SCALES + r)", "(LATENT + r)"),
    "a step's rotary values come from one page": (
        "pages[u], seq_len, table, cache, smem, place",
        "pages[0], seq_len, table, cache, smem, place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    assert_seen(MISTAKES[mistake], build, both, monkeypatch)
