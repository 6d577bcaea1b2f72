"""What only the plain torch decode promises, beyond test_kernel_decode.py, which runs every decode kernel."""

import pytest
import torch

from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, cpu_attention, float32, format_of
from mla_kernels.bfloat16 import exact_product, multiplies_bfloat16
from mla_kernels.decode import torch_decode
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, PagedCase, assert_matches, make_decode


def geometry(num_heads=5, latent=64, rope=32):
    return MLAGeometry(
        num_heads=num_heads, kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=rope, v_head_dim=64
    )


def check(case):
    """Run into strided outputs full of NaN, and compare every row, owned or not."""
    q_latent = case.arrays[0]
    tokens, heads, latent = q_latent.shape
    wide = torch.full((tokens, heads + 1, latent + 8), torch.nan, dtype=q_latent.dtype)
    out, lse = wide[:, :heads, :latent], torch.full((heads, tokens + 2), torch.nan).T[:tokens]
    torch_decode.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=())
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q_latent.dtype])
    assert int(wide.isnan().sum()) == wide.numel() - out.numel(), "wrote beside the output"


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_lens", [1, 3, [1, 0, 4, 2, 1]], ids=str)
def test_dtypes(query_lens, dtype, needles):
    case = make_decode(
        geometry(), [15, 16, 0, 17, 200], query_lens=query_lens, dtype=dtype, needles=needles, page_gap=40
    )
    check(case)


@pytest.mark.parametrize(
    ("heads", "latent", "rope", "page_size"),
    [(1, 512, 0, 1), (12, 256, 64, 32), (20, 320, 32, 64), (128, 512, 64, 128)],
)
def test_geometries_and_page_sizes(heads, latent, rope, page_size):
    check(make_decode(geometry(heads, latent, rope), [page_size + 1, 70], page_size=page_size))


@pytest.mark.parametrize("first", [0, 2])
def test_rows_without_a_request(first):
    """Captured graphs pad the queries: rows before the first start and behind the last are zeros and -inf."""
    case = make_decode(geometry(), [40, 7], query_lens=[1, 2])
    q_latent, q_rope, *rest = case.arrays
    padded = [torch.full((8, *x.shape[1:]), torch.nan) for x in (q_latent, q_rope)]
    for wide, x in zip(padded, (q_latent, q_rope), strict=True):
        wide[first : first + 3] = x
    options = case.options | {"query_start_B1": case.options["query_start_B1"] + first}
    check(PagedCase(geometry=case.geometry, arrays=(*padded, *rest), options=options))


@pytest.fixture(params=[1, 3, 8], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_lens", [1, 3])
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_long_requests_take_turns(monkeypatch, query_lens, dtype, threads, page_size):
    """Of some pages each, which no number of pieces need divide; the last query tokens are on both sides of a turn's
    end."""
    monkeypatch.setattr(torch_decode, "_AT_ONCE", 400 * 96 * dtype.itemsize)
    monkeypatch.setattr(torch_decode, "_FEW", 200)
    monkeypatch.setattr(cpu_attention, "PIECE", 16)
    lengths = [401, 385, 900, 1201, 37, 400]
    check(make_decode(geometry(), lengths, query_lens=query_lens, dtype=dtype, page_size=page_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_lens", [1, 2, [1, 2] * 12])
def test_requests_of_like_length_go_together(monkeypatch, query_lens, dtype, threads):
    """In another order than theirs; each answer is its own."""
    monkeypatch.setattr(torch_decode, "_FEW", 100)
    monkeypatch.setattr(cpu_attention, "PIECE", 16)
    groups = []
    split = torch_decode._groups
    monkeypatch.setattr(torch_decode, "_groups", lambda *args: groups.extend(split(*args)) or iter(list(groups)))
    lengths = [40 + (i * 7) % 24 for i in range(23)] + [500]
    check(make_decode(geometry(), lengths, query_lens=query_lens, dtype=dtype))
    assert 1 < len(groups) < len(lengths) / 2


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("lengths", [[450, 450], [449, 451, 450], [338, 1, 508]], ids=str)
def test_groups_in_pieces(lengths, page_size, threads):
    """Of a model's width, by as many pieces as a group of so few leaves threads for."""
    check(make_decode(geometry(16, 512, 64), lengths, page_size=page_size))


def check_made(case):
    """Outputs that the call makes: whole, and side by side."""
    out, lse = torch_decode.run(*case.arrays, **case.options)
    expected, expected_lse = case.reference()
    assert (out.dtype, lse.dtype) == (case.arrays[0].dtype, torch.float32)
    assert all(x.is_contiguous() for x in (out, lse))
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[out.dtype])


CACHES = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "fp8": {"dtype": torch.bfloat16, "cache_dtype": torch.float8_e4m3fn, "cache_scale": 0.5},
    "tile-scaled": {"cache_dtype": torch.uint8},
}


@pytest.mark.parametrize("operator", [True, False], ids=["oneDNN", "BLAS"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("query_lens", [1, 3])
@pytest.mark.parametrize("length", [3, 40, 255, 301, 700])
def test_one_request(monkeypatch, length, query_lens, cache, operator, threads):
    """Few rows go another way than many, and its answer is returned as it is."""
    if not operator:
        monkeypatch.setattr(float32, "_linear", lambda: None)
    check_made(make_decode(geometry(16, 256, 64), [length], query_lens=query_lens, page_gap=32, **CACHES[cache]))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("first", [0, 1])
def test_one_request_among_others_without_keys(first, cache):
    lengths = [0, 0, 0]
    lengths[first] = 300
    check_made(make_decode(geometry(16, 256, 64), lengths, query_lens=2, **CACHES[cache]))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("query_lens", [1, [2, 1, 0, 1, 2]], ids=str)
def test_uneven_requests(query_lens, cache, threads):
    """Too uneven for one group; the longest by itself, with 3 threads and fewer."""
    check_made(make_decode(geometry(16, 256, 64), [700, 64, 300, 60, 1000], query_lens=query_lens, **CACHES[cache]))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", [40, 300])
def test_more_query_tokens_than_keys(length, cache):
    """The first see nothing: zeros and -inf."""
    check_made(make_decode(geometry(4, 256, 64), [length], query_lens=length + 5, **CACHES[cache]))


def test_a_table_that_is_too_short_is_refused():
    latent, rope, cache, table, _ = make_decode(geometry(), [40, 7]).arrays
    with pytest.raises(ValueError, match="50 cached tokens need 4 pages, got 3"):
        torch_decode.run(latent, rope, cache, table[:, :3], torch.tensor([50, 7]), scale=1.0)


def test_products_of_bfloat16_keep_what_rounding_takes():
    if not multiplies_bfloat16(torch.bfloat16):
        pytest.skip("this processor does not multiply bfloat16")
    q, k = (torch.randn(3, rows, 576).bfloat16() * 3 for rows in (16, 300))
    wanted = torch.bmm(q.double(), k.double().mT)
    rounded = (torch.bmm(q, k.mT).double() - wanted).abs().max()
    assert (exact_product(q, k.mT) - wanted).abs().max() < rounded / 200
    assert (exact_product(q[1], k[1].T) - wanted[1]).abs().max() < rounded / 200
    assert not multiplies_bfloat16(torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("rows", "others"), [(1, 3), (16, 64), (16, 700), (128, 300)])
def test_products_of_float32(monkeypatch, rows, others):
    """Of rows and of columns that lie side by side, and without oneDNN."""
    a, b = torch.randn(rows, 320), torch.randn(others, 320)
    wanted = a.double() @ b.double().T
    for _ in range(2):
        for right in (b, b.T.contiguous().T):
            assert (float32.product(a, right) - wanted).abs().max() < 1e-4
        monkeypatch.setattr(float32, "_linear", lambda: None)
    assert torch.equal(float32.product(a.double(), b.double()), wanted)


def test_needs_no_workspace_and_only_cpu_tensors():
    layout = CacheLayout(geometry=geometry(), format=format_of(torch.float32), page_size=16)
    problem = Problem(layout=layout, dtype=torch.float32)
    assert torch_decode.workspace(problem, Device("cpu"), max_requests=8) == ()
    assert torch_decode.unsupported(problem, Device("cpu")) == []
    assert torch_decode.unsupported(problem, Device("cuda", 90, "H200")) == ["runs on CPU tensors, got H200 sm_90"]


def test_wrong_query_count_is_refused():
    with pytest.raises(ValueError, match="2 requests of 3 query tokens need 6 queries, got 2"):
        torch_decode.run(*make_decode(geometry(), [40, 7]).arrays, scale=1.0, query_len=3)
