"""The Hopper decode kernel where products are transposed or the cache is fp8, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from hopper_devices import NEEDS_HOPPER

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, device_of, format_of, reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode

pytestmark = NEEDS_HOPPER

TWO_AND_A_BIT = 0x40100000  # 2.25 as an integer: scratch holds what others left, such as floats
KERNEL = next(k for k in OPERATIONS["decode"] if k.name == "gluon_sm90")
E4M3 = torch.float8_e4m3fn
PACKED = {"cache_dtype": torch.uint8}
CACHES = {
    "16 bits": {},
    "fp8": {"cache_dtype": E4M3},
    "fp8 with a scale": {"cache_dtype": E4M3, "cache_scale": 0.037},
    "packed": PACKED,
}


@pytest.fixture(params=CACHES)
def cache(request):
    return CACHES[request.param]


def make(heads, seq_lens, *, rope=64, dtype=torch.bfloat16, page_size=64, **options):
    geometry = MLAGeometry(
        num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128
    )
    return make_decode(geometry, seq_lens, page_size=page_size, dtype=dtype, device="cuda", **options)


def check(case, same=None):
    """same: a case of the same answer; the case itself without."""
    q_latent, _, cache_AGK, _, seq_lens = case.arrays
    layout = CacheLayout(geometry=case.geometry, format=format_of(cache_AGK.dtype), page_size=cache_AGK.shape[1])
    problem = Problem(layout=layout, dtype=q_latent.dtype, max_query_len=case.options["query_len"])
    assert KERNEL.unsupported(problem, device_of(cache_AGK)) == []
    workspace = tuple(
        torch.full(shape, TWO_AND_A_BIT if dtype == torch.int32 else torch.nan, dtype=dtype, device="cuda")
        for shape, dtype in KERNEL.load().workspace(problem, device_of(cache_AGK), max_requests=len(seq_lens))
    )
    out, lse = torch.full_like(q_latent, torch.nan), torch.full(q_latent.shape[:2], torch.nan, device="cuda")
    KERNEL.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=workspace)
    same = same or case
    expected, expected_lse = same.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q_latent.dtype], same.magnitude())
    return out, lse


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [15, 200, 16, 1, 130], [3000, 5, 700]], ids=str)
def test_lengths_around_every_edge(seq_lens, dtype, needles, cache):
    check(make(16, seq_lens, dtype=dtype, needles=needles, **cache))


@pytest.mark.parametrize("page_gap", [0, 576, 96], ids=["dense", "tma", "gather"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128, 192])
def test_pages(page_size, page_gap, cache):
    check(make(16, [page_size + 1, max(page_size - 1, 1), 131, 777], page_size=page_size, page_gap=page_gap, **cache))


@pytest.mark.parametrize(("heads", "query_len"), [(1, 1), (3, 1), (16, 1), (4, 4), (2, 7)])
@pytest.mark.parametrize("rope", [64, 0])
def test_up_to_16_query_rows(heads, query_len, rope, cache):
    check(make(heads, [129, query_len, 1000], rope=rope, query_lens=query_len, **cache))


@pytest.mark.parametrize(("heads", "query_len"), [(17, 1), (32, 1), (16, 2), (8, 4)])
@pytest.mark.parametrize("rope", [64, 0])
def test_up_to_32_query_rows(heads, query_len, rope, cache):
    check(make(heads, [129, query_len, 1000], rope=rope, query_lens=query_len, **cache))


@pytest.mark.parametrize(("heads", "query_len"), [(33, 1), (20, 4), (64, 1), (128, 1), (128, 4), (16, [4, 1, 2])])
@pytest.mark.parametrize("rope", [64, 0])
def test_more_query_rows_of_fp8(heads, query_len, rope):
    check(make(heads, [129, 4, 1000], rope=rope, query_lens=query_len, **CACHES["fp8 with a scale"]))
    check(make(heads, [129, 4, 1000], rope=rope, query_lens=query_len, page_size=48, **CACHES["fp8"]))
    check(make(heads, [129, 4, 1000], rope=rope, query_lens=query_len, **PACKED))
    check(make(heads, [129, 4, 1000], rope=rope, query_lens=query_len, page_size=16, dtype=torch.float16, **PACKED))


@pytest.mark.parametrize("name", ["fp8", "fp8 with a scale"])
@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize(
    ("seq_lens", "page_size"),
    [([1, 0, 17], 64), ([63, 64, 65], 1), ([15, 200, 16, 1, 130], 16), ([3000, 5, 700], 48), ([127, 129, 9000], 128)],
    ids=str,
)
def test_lengths_of_more_query_rows_of_fp8(seq_lens, page_size, needles, name):
    for dtype in (torch.bfloat16, torch.float16):
        check(make(40, seq_lens, page_size=page_size, dtype=dtype, needles=needles, **CACHES[name]))


@pytest.mark.parametrize("score", [-1000.0, 1000.0, None])
@pytest.mark.parametrize("heads", [12, 48])
def test_references_that_move(heads, score):
    """Scores all far from zero, or growing again and again by more than a reference may lag behind."""
    case = make(heads, [5000, 300, 70], dtype=torch.float16, needles=score is None, cache_dtype=E4M3)
    _, q_rope, cache_AGK, _, _ = case.arrays
    if score is None:
        case.options["scale"] *= 8
    else:
        cache_AGK[..., 512:] = torch.ones(64, device="cuda").to(E4M3)
        q_rope[:] = score / 64 / case.options["scale"]
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [5, 30, 40])
def test_any_scale_of_packed_rows_is_read(heads, dtype):
    """vLLM before its pull request 49435 wrote amax / 448 as it was. Of more than 32 rows values are rounded to the
    queries' dtype once."""
    case = make(heads, [40, 130], dtype=dtype, **PACKED)
    scales = case.arrays[2][..., 512:528].view(torch.float32)
    scales *= 0.5 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(0)).cuda()
    if heads <= 32:
        check(case)
        return
    latent, rope, cache, *rest = case.arrays
    rounded = reference.values_of(cache, 576, torch.float32).to(dtype)
    check(case, replace(case, arrays=(latent, rope, rounded, *rest)))


def scales_of(case):
    """Of packed rows, [pages, tokens, 4], in place."""
    return case.arrays[2][..., 512:528].view(torch.float32)


def by_token(case, request):
    """(page, offset) of each of a request's tokens."""
    token = torch.arange(int(case.arrays[4][request]), device="cuda")
    size = case.arrays[2].shape[1]
    return case.arrays[3][request, token // size].long(), token % size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [12, 30])
def test_scales_of_packed_rows_that_grow(heads, dtype):
    """From 2^-16 to 2^5 and back, by more than weights have room for, differently from tile to tile."""
    case = make(heads, [3000, 5000, 30], needles=False, dtype=dtype, **PACKED)
    for request in range(3):
        page, offset = by_token(case, request)
        order = 4 * (torch.arange(len(page)) // 64 % 5)[:, None] + torch.tensor([0, 3, -2, 1])
        scales_of(case)[page, offset] = (2.0 ** (order - 14)).cuda()
    for queries in case.arrays[:2]:
        queries.zero_()  # no reference of the softmax moves, and every token counts
    check(case)


@pytest.mark.parametrize("heads", [12, 30])
@pytest.mark.parametrize("place", [0, 700, 1999])
def test_a_scale_of_packed_rows_that_falls_is_not_lost(heads, place):
    """What all queries look at has scales of 2^-12 of the others', before it and behind it."""
    case = make(heads, [2000, 20], needles=False, dtype=torch.float16, **PACKED)
    q_latent, q_rope, cache_AGK, _, _ = case.arrays
    page, offset = (x[place] for x in by_token(case, 0))
    scales_of(case).mul_(2.0**14)
    scales_of(case)[page, offset] *= 2.0**-12
    q_latent[:], q_rope[:] = 0, 0
    q_rope[..., 0] = 8.0
    rope = cache_AGK[..., 528:].view(torch.bfloat16)
    rope[..., 0] = 0
    rope[page, offset, 0] = 64.0  # a score of 37 beside zeros
    check(case)


@pytest.mark.parametrize("heads", [12, 30])
@pytest.mark.parametrize("score", [None, -1000.0, 1000.0])
def test_references_that_move_with_packed_rows(heads, score):
    case = make(heads, [5000, 300, 70], needles=score is None, **PACKED)
    _, q_rope, cache_AGK, _, _ = case.arrays
    if score is None:
        case.options["scale"] *= 8
    else:
        cache_AGK[..., 528:].view(torch.bfloat16)[:] = 1
        q_rope[:] = score / 64 / case.options["scale"]
    check(case)


@pytest.mark.parametrize("heads", [5, 20])
@pytest.mark.parametrize("what", ["code", "scale", "infinite scale", "rope"])
def test_what_is_no_number_in_packed_rows_stays_in_its_request(heads, what):
    """In a request that is cut: its answers are no numbers, those of others what they are without it."""
    case = make(heads, [30, 20000, 65], needles=False, **PACKED)
    cache_AGK = case.arrays[2]
    page, offset = (x[7000] for x in by_token(case, 1))
    at, value = {
        "code": (77, torch.tensor([0x7F], dtype=torch.uint8)),
        "scale": (520, torch.tensor([torch.nan])),
        "infinite scale": (520, torch.tensor([torch.inf])),
        "rope": (528, torch.tensor([torch.nan], dtype=torch.bfloat16)),
    }[what]
    wanted, wanted_lse = KERNEL.run(*case.arrays, **case.options)
    value = value.view(torch.uint8).cuda()
    cache_AGK[page, offset, at : at + len(value)] = value
    out, lse = KERNEL.run(*case.arrays, **case.options)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], wanted[[0, 2]])
    assert torch.equal(lse[[0, 2]], wanted_lse[[0, 2]])


@pytest.mark.parametrize("heads", [1, 20, 40])
def test_every_code_of_packed_rows(heads):
    """With scales of several sizes, in what a query reads that looks at one key only."""
    case = make(heads, [4], needles=False, dtype=torch.float16, **PACKED)
    q_latent, q_rope, cache_AGK, table, _ = case.arrays
    codes = torch.arange(512, device="cuda").remainder(256).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    page = int(table[0, 0])
    scales = torch.tensor([2.0**-13, 1.0, 8.0, 2.0**-3], device="cuda")
    cache_AGK[page, :4] = 0
    cache_AGK[page, 2, :512] = codes
    cache_AGK[page, 2, 512:528] = scales.view(torch.uint8)
    cache_AGK[page, 2, 528:530] = torch.tensor([64.0], dtype=torch.bfloat16, device="cuda").view(torch.uint8)
    q_latent[:], q_rope[:] = 0, 0
    q_rope[..., 0] = 8.0  # a score of 37 beside zeros
    out, _ = KERNEL.run(*case.arrays, **case.options)
    wanted = codes.view(E4M3).float() * scales.repeat_interleave(128)
    assert torch.equal(out[0], wanted.to(out.dtype).expand(heads, -1))


@pytest.mark.parametrize("heads", [5, 20, 40])
def test_packed_rows_of_values_that_float16_cannot_hold(heads):
    case = make(heads, [140], needles=False, **PACKED)
    case.arrays[2][..., 512:528].view(torch.float32).mul_(2.0**20)
    case.arrays[0].mul_(2.0**-20)
    check(case)


def test_query_tokens_before_the_sequence_see_nothing(cache):
    check(make(4, [0, 2, 40], query_lens=4, **cache))


def test_ragged(cache):
    check(make(5, [5, 70, 1, 33, 2000], query_lens=[3, 1, 1, 3, 2], **cache))
    check(make(5, [5, 70, 9], query_lens=[2, 0, 3], **cache))
    check(make(10, [5, 70, 1, 33, 2000], query_lens=[3, 1, 1, 3, 2], page_size=16, **cache))


@pytest.mark.parametrize("batch", [1, 2, 40, 131, 133, 300])
def test_batches_cut_in_every_way(batch, cache):
    lengths = [1 + (i * i * 97 + 31 * batch) % 1200 for i in range(batch)]
    check(make(16, lengths, **cache))
    if cache == PACKED:
        check(make(32, lengths, **cache))
    elif cache:
        check(make(66, lengths, **cache))


@pytest.mark.parametrize("heads", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_is_the_value_that_torch_says(dtype, heads):
    """A query that looks at one key only reads out that key's codes; NaN stays NaN."""
    case = make(heads, [4], rope=0, dtype=dtype, needles=False, cache_dtype=E4M3)
    q_latent, _, cache_AGK, table, _ = case.arrays
    codes = torch.arange(512, device="cuda").remainder(256).to(torch.uint8)
    not_a_number = (codes & 0x7F) == 0x7F
    numbers = codes.masked_fill(not_a_number, 0)
    page = int(table[0, 0])
    cache_AGK[page, :4] = torch.zeros(4, 512, device="cuda").to(E4M3)
    cache_AGK[page, 2] = numbers.view(E4M3)
    q_latent[:] = 0
    q_latent[0, 0, 126] = 1.0  # code 126 is 448: a score of 32 beside zeros, whose weight is one even in bfloat16
    out, _ = KERNEL.run(*case.arrays, **case.options)
    assert torch.equal(out[0, 0], numbers.view(E4M3).to(dtype))
    cache_AGK[page, 2] = codes.view(E4M3)
    out, _ = KERNEL.run(*case.arrays, **case.options)
    assert out[0, 0][not_a_number].isnan().all()
