"""Absorbed decode: every kernel of OPERATIONS["decode"] against the float64 reference."""

import pytest
import torch

from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, device_of, format_of
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = OPERATIONS["decode"]
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if WHERE == "cuda" else ())


def geometry(num_heads=5, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64):
    return MLAGeometry(
        num_heads=num_heads,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        qk_nope_head_dim=qk_nope_head_dim,
        v_head_dim=v_head_dim,
    )


def check(kernel, case):
    """Run `kernel` into outputs full of NaN and compare rows that a request owns."""
    q_latent, cache, seq_lens = case.arrays[0], case.arrays[2], case.arrays[4]
    layout = CacheLayout(geometry=case.geometry, format=format_of(cache.dtype), page_size=cache.shape[1])
    problem = Problem(layout=layout, dtype=q_latent.dtype, max_query_len=case.options["query_len"])
    device = device_of(cache)
    reasons = kernel.unsupported(problem, device)
    if reasons:
        pytest.skip("; ".join(reasons))
    shapes = kernel.load().workspace(problem, device, max_requests=len(seq_lens))
    workspace = tuple(
        torch.full(shape, -1 if dtype == torch.int32 else torch.nan, dtype=dtype, device=cache.device)
        for shape, dtype in shapes
    )
    out = torch.full_like(q_latent, torch.nan)
    lse = torch.full(q_latent.shape[:2], torch.nan, dtype=torch.float32, device=cache.device)
    kernel.run(*case.arrays, **case.options, out_TNL=out, lse_TN=lse, workspace=workspace)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q_latent.dtype])


@pytest.fixture(params=KERNELS, ids=lambda k: k.name)
def kernel(request):
    return request.param


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [15, 200, 16, 1, 130], [700]], ids=str)
def test_lengths_around_every_edge(kernel, seq_lens, dtype, needles):
    check(kernel, make_decode(geometry(), seq_lens, dtype=dtype, needles=needles, device=WHERE))


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128, 48])
def test_page_sizes_and_strided_pages(kernel, page_size):
    case = make_decode(
        geometry(), [page_size + 1, max(page_size - 1, 1), 131], page_size=page_size, page_gap=96, device=WHERE
    )
    check(kernel, case)


@pytest.mark.parametrize(
    ("heads", "latent", "rope"),
    [(1, 128, 0), (5, 256, 32), (12, 512, 64), (20, 512, 0), (128, 128, 64)],
    ids=lambda n: str(n),
)
def test_geometries(kernel, heads, latent, rope):
    check(kernel, make_decode(geometry(heads, latent, rope), [129, 40], page_size=64, device=WHERE))


@pytest.mark.parametrize("query_len", [2, 3, 16])
def test_several_query_tokens_are_causal(kernel, query_len):
    case = make_decode(geometry(), [query_len, query_len + 1, 130, 64], query_lens=query_len, device=WHERE)
    check(kernel, case)


def test_query_tokens_before_the_sequence_see_nothing(kernel):
    """A padded row of a captured graph: query tokens, but a sequence of length 0 or shorter than the query."""
    check(kernel, make_decode(geometry(), [0, 2, 40], query_lens=4, device=WHERE))


def test_ragged_query_lengths(kernel):
    check(kernel, make_decode(geometry(), [5, 70, 1, 33], query_lens=[5, 1, 1, 3], device=WHERE))


def test_a_request_without_queries_is_no_request(kernel):
    check(kernel, make_decode(geometry(), [5, 70, 9], query_lens=[2, 0, 3], device=WHERE))


def test_one_long_request_among_short_ones(kernel):
    """The long one is cut into pieces, the short ones are not."""
    check(kernel, make_decode(geometry(2), [3, 900, 1, 30, 64], page_size=64, device=WHERE))


def test_strided_queries_and_outputs(kernel):
    """Engines hand over slices: the rotary part is a slice of the unabsorbed query."""
    case = make_decode(geometry(), [40, 7], device=WHERE)
    latent, rope, *rest = case.arrays
    wide = torch.full((*latent.shape[:2], 400), torch.nan, dtype=latent.dtype, device=WHERE)
    wide[..., :128], wide[..., 300:332] = latent, rope
    case = type(case)(geometry=case.geometry, arrays=(wide[..., :128], wide[..., 300:332], *rest), options=case.options)
    check(kernel, case)


def test_wrong_query_count_is_refused(kernel):
    case = make_decode(geometry(), [40, 7], device=WHERE)
    if kernel.unsupported(
        Problem(
            layout=CacheLayout(geometry=geometry(), format=format_of(torch.float32), page_size=16), dtype=torch.float32
        ),
        device_of(WHERE),
    ):
        pytest.skip("does not run here")
    with pytest.raises(ValueError, match="2 requests of 3 query tokens need 6 queries, got 2"):
        kernel.run(*case.arrays, scale=1.0, query_len=3)


def test_scratch_is_not_overrun():
    """As many partial results as a batch can have: every request is a little longer than one piece."""
    from mla_kernels.decode import triton_splitkv

    case = make_decode(geometry(2, 128, 16), [192] * 5, page_size=64, device=WHERE)
    cache, device = case.arrays[2], device_of(WHERE)
    if not device.runs_triton:
        pytest.skip("needs a GPU (or TRITON_INTERPRET=1)")
    layout = CacheLayout(geometry=case.geometry, format=format_of(cache.dtype), page_size=64)
    shapes = triton_splitkv.workspace(Problem(layout=layout, dtype=cache.dtype), device, max_requests=5)
    guarded = [torch.full((2 * shape[0],), -7, dtype=dtype, device=WHERE) for shape, dtype in shapes]
    workspace = [tensor[: shape[0]] for tensor, (shape, _) in zip(guarded, shapes, strict=True)]
    triton_splitkv.run(*case.arrays, **case.options, workspace=workspace)
    for tensor, (shape, _) in zip(guarded, shapes, strict=True):
        assert (tensor[shape[0] :] == -7).all()
    if WHERE == "cpu":  # a GPU cuts these few tokens less
        assert (workspace[1][shapes[1][0][0] // 2 :] != -7).any(), "the second half is needed too"


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "device",
    [Device("cuda", 90, "H200", 132), Device("cuda", 89, "L4", 58), Device("hip", "gfx942", "MI300X", 304)],
    ids=lambda d: d.name,
)
def test_scratch_suffices_for_every_query_length(device, dtype, fp8):
    """A server reserves once, for the most query tokens; every step with fewer must fit."""
    from mla_kernels.decode import triton_splitkv

    for heads in (1, 2, 5, 8, 12, 16, 20, 64, 128):
        for most in (1, 2, 4, 9, 16):
            cache_format = format_of(torch.float8_e4m3fn if fp8 else dtype)
            layout = CacheLayout(geometry=geometry(heads, 512, 64), format=cache_format, page_size=64)
            problem = Problem(layout=layout, dtype=dtype, max_query_len=most)
            reserved = triton_splitkv.workspace(problem, device, max_requests=8)[1][0][0]
            for query_len in range(1, most + 1):
                sizes = (query_len * heads, layout.row_elements, dtype.itemsize, device, fp8)
                needed = triton_splitkv._scratch_rows(*sizes)
                assert needed <= reserved, (heads, most, query_len)
