"""FlashInfer as a candidate, without it: when it is refused, and that our side of its calls agrees with the reference.

Its wrappers are played by flashinfer_stand_in.py; on a GPU with the real ones: test_gpu_flashinfer.py.
"""

from dataclasses import replace

import flashinfer_stand_in
import pytest
import torch
from flashinfer_stand_in import Decode, Prefill
from hopper_devices import H200

from mla_kernels import (
    OPERATIONS,
    CacheLayout,
    Device,
    MLAGeometry,
    Problem,
    UnsupportedMLA,
    by_name_alone,
    format_of,
    select,
)
from mla_kernels.testing import (
    LSE_TOLERANCE,
    TOLERANCE,
    RaggedCase,
    assert_matches,
    check_prefill,
    make_decode,
    make_prefill,
)

pytest.importorskip("triton", reason="needs the package triton")

BF16, FP16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAMES = {"decode": "flashinfer_mla", "prefill": "flashinfer_ragged"}
KERNELS = {operation: next(k for k in OPERATIONS[operation] if k.name == name) for operation, name in NAMES.items()}
GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
both = pytest.mark.parametrize("operation", NAMES)


@pytest.fixture
def stand_in(monkeypatch):
    flashinfer_stand_in.put_in(monkeypatch)


def geometry(heads=3, **widths):
    return replace(GEOMETRY, num_heads=heads, **widths)


def problem_of(shape=GEOMETRY, dtype=BF16, cache=BF16, page_size=64, **more):
    return Problem(
        layout=CacheLayout(geometry=shape, format=format_of(cache), page_size=page_size), dtype=dtype, **more
    )


# When it is taken.


@both
def test_absent_is_a_reason(monkeypatch, operation):
    monkeypatch.setattr("mla_kernels.flashinfer_calls.find_spec", lambda name: None)
    with pytest.raises(UnsupportedMLA) as error:
        select(operation, problem_of(), H200, kernel=NAMES[operation])
    (only,) = str(error.value).splitlines()[1:]
    assert only.startswith(f"  {NAMES[operation]}: needs the package flashinfer, which is not installed (pip install")


@both
def test_taken_by_its_name_alone(stand_in, operation):
    """On an H200 it was not found to be faster; every other place is refused."""
    assert select(operation, problem_of(), H200, kernel=NAMES[operation]).kernel.name == NAMES[operation]
    assert not select(operation, problem_of(), H200).kernel.name.startswith("flashinfer")
    assert by_name_alone(operation, problem_of(), H200)[NAMES[operation]] == []
    assert by_name_alone(operation, problem_of(), Device("cpu"))[NAMES[operation]] == ["needs sm_90, got cpu"]


@both
@pytest.mark.parametrize(
    ("device", "got"),
    [
        (replace(H200, arch=80), "NVIDIA H200 sm_80"),
        (replace(H200, arch=100), "NVIDIA H200 sm_100"),
        (Device("hip", "gfx942", "MI300X", 304), "MI300X gfx942"),
        (Device("cpu"), "cpu"),
    ],
    ids=str,
)
def test_other_gpus(stand_in, operation, device, got):
    assert KERNELS[operation].unsupported(problem_of(), device) == [f"needs sm_90, got {got}"]


@pytest.mark.parametrize(
    ("operation", "problem", "reasons"),
    [
        ("decode", problem_of(page_size=1, max_query_len=16), []),
        ("decode", problem_of(geometry(qk_nope_head_dim=192, v_head_dim=256)), []),
        (
            "decode",
            problem_of(dtype=FP16, cache=FP16),
            ["queries must be bfloat16, got torch.float16", "cache must be bfloat16, got fp16"],
        ),
        ("decode", problem_of(cache=FP8), ["cache must be bfloat16, got fp8"]),
        ("decode", problem_of(geometry(kv_lora_rank=256)), ["needs latent 512 + rope 64, got 256 + 64"]),
        ("decode", problem_of(geometry(qk_rope_head_dim=0)), ["needs latent 512 + rope 64, got 512 + 0"]),
        (
            "decode",
            problem_of(split_tokens=384, max_seq_len=1000),
            ["cuts requests where the batch wants it, got splits of 384 tokens"],
        ),
        (
            "decode",
            problem_of(max_query_len=1 << 16),
            ["needs heads x query tokens of 524288 or less, got 1048576"],
        ),
        ("prefill", problem_of(cache=FP8, split_tokens=384, max_seq_len=1000), []),
        ("prefill", problem_of(dtype=F32), ["queries must be bfloat16, got torch.float32"]),
        (
            "prefill",
            problem_of(geometry(qk_nope_head_dim=192, v_head_dim=256)),
            ["needs nope 128 + rope 64 and v 128, got 192 + 64 and 256"],
        ),
    ],
)
def test_problems(stand_in, operation, problem, reasons):
    assert KERNELS[operation].unsupported(problem, H200) == reasons


@both
def test_no_graph_captures_it(stand_in, monkeypatch, operation):
    """Engines are told, and one that captures it all the same hears why it cannot."""
    others = [kernel for kernel in OPERATIONS[operation] if not kernel.name.startswith("flashinfer")]
    assert [kernel.capturable for kernel in (KERNELS[operation], *others)] == [False] + [True] * len(others)
    monkeypatch.setattr("mla_kernels.flashinfer_calls._is_captured", lambda x: True)
    case = make_decode(geometry(), [40, 7]) if operation == "decode" else make_prefill(geometry(), [4])
    with pytest.raises(RuntimeError, match=f"{NAMES[operation]} plans on the host.* capture none, or let another"):
        KERNELS[operation].run(*case.arrays, **case.options)


# Decode.


def run_decode(case, change=lambda arrays: arrays, out=None):
    """Into outputs full of NaN, with scratch that holds what others left."""
    q, cache = case.arrays[0], case.arrays[2]
    problem = problem_of(case.geometry, page_size=cache.shape[1], max_query_len=case.options["query_len"])
    shapes = KERNELS["decode"].load().workspace(problem, H200, max_requests=len(case.arrays[4]))
    scratch = [torch.full(shape, 77, dtype=dtype) for shape, dtype in shapes]
    out = torch.empty_like(q) if out is None else out
    into = {"out_TNL": out.fill_(torch.nan), "lse_TN": torch.full(q.shape[1::-1], torch.nan).T}  # heads first
    KERNELS["decode"].run(*change(case.arrays), **case.options, **into, workspace=scratch)
    expected, expected_lse = case.reference()
    assert_matches("lse", into["lse_TN"], expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[F32])


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("seq_lens", [[1, 0, 17], [63, 64, 65], [0, 0], [200]], ids=str)
def test_decode_lengths(stand_in, seq_lens, page_size):
    run_decode(make_decode(geometry(), seq_lens, page_size=page_size, page_gap=576))


@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [([3, 4, 130], 3), ([0, 2, 40], 4), ([5, 70, 1, 33], [5, 1, 1, 3]), ([5, 70, 9], [2, 0, 3])],
    ids=str,
)
def test_decode_of_several_query_tokens(stand_in, seq_lens, query_lens):
    """Causal, ragged, and those that see nothing: before a sequence begins, or without one."""
    run_decode(make_decode(geometry(), seq_lens, query_lens=query_lens))


def test_decode_by_several_plans(stand_in, monkeypatch):
    """FlashInfer's plan holds so many tiles of 64 rows; 16 heads fill one with 4 tokens."""
    monkeypatch.setattr(KERNELS["decode"].load(), "_MOST_TILES", 2)
    run_decode(make_decode(GEOMETRY, [20, 9, 30, 5, 40], query_lens=[4, 4, 8, 0, 1]))
    assert Decode.planned == [[4, 4], [8, 0], [1]]


@pytest.mark.parametrize("shift", [0, 2], ids=["aligned", "misaligned"])
def test_decode_of_slices(stand_in, shift):
    """Rotary parts are slices of unabsorbed queries; where FlashInfer would misread or miswrite one it gets a copy."""
    case = make_decode(geometry(), [40, 7])

    def widen(arrays):
        latent, rope, *rest = arrays
        wide = torch.full((*latent.shape[:2], 800), torch.nan)
        wide[..., shift : shift + 512], wide[..., 600 + shift : 664 + shift] = latent, rope
        return wide[..., shift : shift + 512], wide[..., 600 + shift : 664 + shift], *rest

    out = torch.full((*case.arrays[0].shape[:2], 528), torch.nan)
    run_decode(case, widen, out[..., shift : shift + 512])
    assert int(out.isnan().sum()) == 16 * out[..., 0].numel(), "wrote beside the output"


def test_decode_refuses_a_cache_that_it_would_misread(stand_in):
    case = make_decode(geometry(), [40, 7], page_gap=4)
    with pytest.raises(ValueError, match="rows of the cache must lie at multiples of 16 bytes, got strides of"):
        KERNELS["decode"].run(*case.arrays, **case.options)


def test_decode_refuses_a_wrong_number_of_queries(stand_in):
    case = make_decode(geometry(), [40, 7])
    with pytest.raises(ValueError, match="2 requests of 3 query tokens need 6 queries, got 2"):
        KERNELS["decode"].run(*case.arrays, scale=1.0, query_len=3)


def test_rows_of_nobody(stand_in):
    """New outputs hold 0 and -inf there; those that are given keep what they held."""
    case = make_decode(geometry(), [9, 30], query_lens=[2, 1])
    latent, rope, *rest = (torch.cat([x, x[:2]]) if i < 2 else x for i, x in enumerate(case.arrays))
    out, lse = KERNELS["decode"].run(latent, rope, *rest, **case.options)
    assert (out[3:] == 0).all()
    assert (lse[3:] == -torch.inf).all()
    assert_matches("out", out[:3], case.reference()[0], TOLERANCE[F32])


def test_a_wrapper_is_kept_with_its_workspace(stand_in):
    """One of FlashInfer's has 8 MiB of its own, pinned and on the device: not one for each call."""
    case = make_decode(geometry(), [9])
    buffers = [(torch.empty(128 << 20, dtype=torch.uint8),) for _ in range(2)]
    for buffer in (*buffers[:1] * 3, buffers[1]):
        KERNELS["decode"].run(*case.arrays, **case.options, workspace=buffer)
    assert Decode.made == 2


def test_decode_without_queries_loads_the_kernel(stand_in):
    """As the warm-up before serving calls it for ragged batches: a query that belongs to nobody."""
    case = make_decode(geometry(), [0], query_lens=[0])
    out, lse = KERNELS["decode"].run(torch.zeros(1, 3, 512), torch.zeros(1, 3, 64), *case.arrays[2:], **case.options)
    assert Decode.planned == [[0]]
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_one_call_warms_decode_up():
    variants = KERNELS["decode"].load().variants
    assert variants(problem_of(), H200, max_requests=9, query_lens=range(1, 5)) == [(1, 1)]
    assert variants(problem_of(), H200, max_requests=9, query_lens=(4,)) == [(1, 4)]
    assert variants(problem_of(), H200, max_requests=9, query_lens=()) == []


# Prefill.


@pytest.fixture
def check(stand_in):
    def run(*lens, heads=2, accumulate=False, change=lambda case: case, **options):
        case = change(make_prefill(geometry(heads), *lens, **options))
        check_prefill(KERNELS["prefill"].run, case, accumulate=accumulate)

    return run


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("lens", "causal"),
    [
        (([1, 0, 16, 63],), True),
        (([17, 129],), True),
        (([5, 70], [67, 71]), True),
        (([70, 3, 66], [5, 1, 65]), True),
        (([65, 2], [128, 0]), True),
        (([20, 3, 65, 0], [200, 64, 1, 5]), False),
        (([20, 3, 65, 0], [63, 0, 65, 0]), False),
        (([3, 1], [0, 0]), False),
    ],
    ids=str,
)
def test_prefill(check, lens, causal, accumulate):
    check(*lens, causal=causal, accumulate=accumulate)


def test_prefill_merges_a_part_at_a_time(check, monkeypatch):
    monkeypatch.setattr(KERNELS["prefill"].load(), "_MERGED", 8)
    check([20, 3], [30, 9], causal=False, accumulate=True)


@pytest.mark.parametrize("shift", [8, 2], ids=["aligned", "misaligned"])
def test_prefill_of_slices(check, shift):
    def widen(case):
        q, k_nope, k_rope, v, *starts = case.arrays
        wide_q, wide_v = (torch.full((*x.shape[:2], x.shape[2] + 16), torch.nan) for x in (q, v))
        q, v = (wide[..., shift : shift + x.shape[2]].copy_(x) for wide, x in ((wide_q, q), (wide_v, v)))
        return RaggedCase(geometry=case.geometry, arrays=(q, k_nope, k_rope, v, *starts), options=case.options)

    check([20, 3], [30, 9], change=widen)


def test_prefill_into_outputs_of_its_own(stand_in):
    case = make_prefill(geometry(), [17, 5])
    *values, query_start, key_start = case.arrays
    out, lse = KERNELS["prefill"].run(*values, query_start.long(), key_start.long(), **case.options)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[F32])


def test_prefill_into_a_misaligned_slice(stand_in):
    case = make_prefill(geometry(), [17, 5])
    wide, lse = torch.full((22, 3, 144), torch.nan), torch.empty(22, 3)
    KERNELS["prefill"].run(*case.arrays, **case.options, out_TNV=wide[..., 2:130], lse_TN=lse)
    assert_matches("out", wide[..., 2:130], case.reference()[0], TOLERANCE[F32])
    assert int(wide.isnan().sum()) == 22 * 3 * 16, "wrote beside the output"


def test_prefill_keeps_rows_of_nobody(stand_in):
    case = make_prefill(geometry(), [4, 3])
    q, *rest = case.arrays
    out, lse = torch.full((9, 3, 128), 7.0), torch.full((9, 3), 7.0)
    KERNELS["prefill"].run(torch.cat([q, q[:2]]), *rest, **case.options, out_TNV=out, lse_TN=lse)
    assert (out[7:] == 7).all()
    assert (lse[7:] == 7).all()
    assert_matches("out", out[:7], case.reference()[0], TOLERANCE[F32])


def test_prefill_without_queries_loads_the_kernel(stand_in):
    """As the warm-up before serving calls it: a query that belongs to nobody."""
    case = make_prefill(geometry(), [0])
    q = torch.zeros(1, 3, 192)
    out, lse = KERNELS["prefill"].run(q, *case.arrays[1:], **case.options)
    assert Prefill.planned == [[[0, 1], [0, 1]]]
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_prefill_says_what_it_takes_for_a_moment():
    """Keys of 192 values, an answer of 128 to merge, both in 16 bits, and what merging takes in float32."""
    bytes_of = KERNELS["prefill"].load().step_bytes
    assert bytes_of(problem_of(), H200, tokens=0, keys=100) == 100 * 16 * 192 * 2
    most = bytes_of(problem_of(), H200, tokens=4096, keys=16384)
    assert most == 16 * ((16384 * 192 + 4096 * 128) * 2 + (2 * 4096 + 3 * 1024 * 128) * 4)
