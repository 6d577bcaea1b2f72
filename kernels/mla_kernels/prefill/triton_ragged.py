"""Ragged prefill attention over expanded heads in Triton: any GPU that Triton supports, and its CPU interpreter.

One program per (query tile, head, request) folds key blocks into an online softmax:
  1. blocks that every query of the tile sees whole, without masks;
  2. the rest, the diagonal and the last keys, with one mask;
  3. the output is divided by the sum of weights and stored with its log-sum-exp.
Where it accumulates, the softmax begins with the answer so far instead of nothing.
Keys are never concatenated: a score is the sum of a nope and a rope product, both read where the projection left them.
"""

import triton
import triton.language as tl

from mla_kernels.device import Device, device_of
from mla_kernels.launching import launch
from mla_kernels.primitives import (
    LN_2,
    LOG2_E,
    cdiv,
    dot,
    dot_operand,
    next_power_of_2,
    prefill_outputs,
    refusals,
    require_adjacent,
)
from mla_kernels.tiles import prefill_tile

# Shape suffixes: T query tokens, S keys, B requests, N heads, P nope, R rope, Q = P + R, V value. In kernels:
# M queries of a tile, K keys of a block. Widths that are no power of two are cut into two column ranges,
# 192 = 128 + 64: P1 + P2 and V1 + V2.


def unsupported(problem, device: Device) -> list[str]:
    return refusals(device, queries=problem.dtype)


@triton.jit
def _rows(
    ptr, row, stride, end, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + BLOCK - 1 of rows that are WIDTH wide; if MASKED, rows from `end` on read as zeros."""
    column = FIRST + tl.arange(0, BLOCK)[None, :]
    at = ptr + row[:, None] * stride + column
    if MASKED:
        x = tl.load(at, mask=(row < end)[:, None] & (column < WIDTH), other=0.0)
    elif FIRST + BLOCK > WIDTH:
        x = tl.load(at, mask=column < WIDTH, other=0.0)
    else:
        x = tl.load(at)
    return dot_operand(x, UPCAST)


@triton.jit
def _fold(
    top_M, total_M, acc1_MV, acc2_MV, q1_MP, q2_MP, q_rope_MR, sees_M, first, last, scale_log2,
    k_nope_ptr, k_rope_ptr, v_ptr, stride_nope, stride_rope, stride_v,
    P: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first .. last - 1; query i sees keys 0 .. sees[i] - 1, or all of these unless MASKED."""
    k_nope_ptr += tl.cast(first, tl.int64) * stride_nope
    k_rope_ptr += tl.cast(first, tl.int64) * stride_rope
    v_ptr += tl.cast(first, tl.int64) * stride_v
    k = tl.arange(0, BLOCK_K)  # offsets within a block fit in 32 bits; the pointers to its first row move in 64
    for start in tl.range(first, last, BLOCK_K):
        here = last - start
        score_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        key = _rows(k_nope_ptr, k, stride_nope, here, 0, P1, P, MASKED, UPCAST)
        score_MK = dot(q1_MP, tl.trans(key), score_MK)
        if P2 > 0:
            key = _rows(k_nope_ptr, k, stride_nope, here, P1, P2, P, MASKED, UPCAST)
            score_MK = dot(q2_MP, tl.trans(key), score_MK)
        if R > 0:
            key = _rows(k_rope_ptr, k, stride_rope, here, 0, R_PAD, R, MASKED, UPCAST)
            score_MK = dot(q_rope_MR, tl.trans(key), score_MK)
        if MASKED:
            score_MK = tl.where((start + k)[None, :] < sees_M[:, None], score_MK, -float("inf"))

        # The scale is positive, so it may follow the maximum; then it costs no multiplication of its own.
        new_top_M = tl.maximum(top_M, tl.max(score_MK, 1) * scale_log2)
        shift_M = new_top_M
        if MASKED:  # a query that has seen no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf)
            shift_M = tl.where(new_top_M == -float("inf"), 0.0, new_top_M)
        weight_MK = tl.exp2(score_MK * scale_log2 - shift_M[:, None])
        rescale_M = tl.exp2(top_M - shift_M)
        total_M = total_M * rescale_M + tl.sum(weight_MK, 1)
        value = _rows(v_ptr, k, stride_v, here, 0, V1, V, MASKED, UPCAST)
        acc1_MV = dot(weight_MK.to(value.dtype), value, acc1_MV * rescale_M[:, None])
        if V2 > 0:
            value = _rows(v_ptr, k, stride_v, here, V1, V2, V, MASKED, UPCAST)
            acc2_MV = dot(weight_MK.to(value.dtype), value, acc2_MV * rescale_M[:, None])
        top_M = new_top_M
        k_nope_ptr += BLOCK_K * stride_nope
        k_rope_ptr += BLOCK_K * stride_rope
        v_ptr += BLOCK_K * stride_v
    return top_M, total_M, acc1_MV, acc2_MV


@triton.jit
def _values_so_far(out_ptr, column, seen_M, real, V: tl.constexpr):
    """Columns of the answer so far, in float32; zeros in rows that have seen no key, whatever stands there."""
    x = tl.load(out_ptr + column[None, :], mask=(real & seen_M)[:, None] & (column < V)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit(
    do_not_specialize=["stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["query_start_ptr", "key_start_ptr", "lse_ptr"],
)
def _prefill_kernel(
    q_ptr, k_nope_ptr, k_rope_ptr, v_ptr, query_start_ptr, key_start_ptr, out_ptr, lse_ptr, scale_log2,
    stride_q_t, stride_q_n, stride_nope_s, stride_nope_n, stride_rope_s, stride_rope_n, stride_v_s, stride_v_n,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    P: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, ACCUMULATE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    head, request = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_query, first_key = tl.load(query_start_ptr + request), tl.load(key_start_ptr + request)
    queries = tl.load(query_start_ptr + request + 1) - first_query
    keys = tl.load(key_start_ptr + request + 1) - first_key
    tile = tl.cdiv(queries, BLOCK_M) - 1 - tl.program_id(0)  # the last queries see most keys: start with them
    if tile < 0:
        return

    first_query, first_key = first_query.to(tl.int64), first_key.to(tl.int64)
    q_ptr += first_query * stride_q_t + head * stride_q_n
    k_nope_ptr += first_key * stride_nope_s + head * stride_nope_n
    k_rope_ptr += first_key * stride_rope_s + head * stride_rope_n
    v_ptr += first_key * stride_v_s + head * stride_v_n
    first_row = tile * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    real = row < queries
    row64 = row.to(tl.int64)
    q1_MP = _rows(q_ptr, row64, stride_q_t, queries, 0, P1, P, True, UPCAST)
    q2_MP = q1_MP
    if P2 > 0:
        q2_MP = _rows(q_ptr, row64, stride_q_t, queries, P1, P2, P, True, UPCAST)
    q_rope_MR = q1_MP
    if R > 0:
        q_rope_MR = _rows(q_ptr + P, row64, stride_q_t, queries, 0, R_PAD, R, True, UPCAST)

    if CAUSAL:  # queries are the last tokens of their keys
        sees_M = tl.minimum(row + 1 + keys - queries, keys)
        whole = tl.maximum(first_row + 1 + keys - queries, 0)
        last = tl.maximum(tl.minimum(first_row + BLOCK_M + keys - queries, keys), 0)
    else:
        sees_M = tl.full((BLOCK_M,), 0, tl.int32) + keys
        whole = keys
        last = keys
    whole = whole // BLOCK_K * BLOCK_K

    top_M = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    acc1_MV = tl.zeros((BLOCK_M, V1), tl.float32)
    acc2_MV = tl.zeros((BLOCK_M, V2 if V2 > 0 else 16), tl.float32)  # unused, and removed, when there is one range
    lse_ptr += first_query * stride_lse_t + head * stride_lse_n + row64 * stride_lse_t
    out_ptr += first_query * stride_out_t + head * stride_out_n + row64[:, None] * stride_out_t
    if ACCUMULATE:
        top_M = tl.load(lse_ptr, mask=real, other=-float("inf")) * LOG2_E
        seen_M = top_M > -float("inf")  # in other rows the first key makes nothing of the weight
        total_M = tl.full((BLOCK_M,), 1.0, tl.float32)
        acc1_MV = _values_so_far(out_ptr, tl.arange(0, V1), seen_M, real, V)
        if V2 > 0:
            acc2_MV = _values_so_far(out_ptr, V1 + tl.arange(0, V2), seen_M, real, V)
    for MASKED in tl.static_range(2):
        top_M, total_M, acc1_MV, acc2_MV = _fold(
            top_M, total_M, acc1_MV, acc2_MV, q1_MP, q2_MP, q_rope_MR, sees_M,
            whole if MASKED else 0, last if MASKED else whole, scale_log2,
            k_nope_ptr, k_rope_ptr, v_ptr, stride_nope_s, stride_rope_s, stride_v_s,
            P, P1, P2, R, R_PAD, V, V1, V2, BLOCK_M, BLOCK_K, MASKED, UPCAST,
        )  # fmt: skip

    total_M = tl.where(total_M > 0, total_M, 1.0)  # a query that saw nothing: zeros, and -inf from its maximum
    share_M = 1.0 / total_M
    lse_M = (top_M + tl.log2(total_M)) * LN_2
    if ACCUMULATE:
        tl.debug_barrier()  # every warp has loaded every row's LSE before one replaces it
    tl.store(lse_ptr, lse_M, mask=real)
    column = tl.arange(0, V1)[None, :]
    tl.store(out_ptr + column, acc1_MV * share_M[:, None], mask=real[:, None] & (column < V))
    if V2 > 0:
        column = V1 + tl.arange(0, V2)[None, :]
        tl.store(out_ptr + column, acc2_MV * share_M[:, None], mask=real[:, None] & (column < V))


def _ranges(width: int) -> tuple[int, int]:
    """Two column ranges that cover `width`: a power of two, and one for the rest or 0. Tensor cores want 16 or more."""
    main = max(16, 1 << width.bit_length() - 1)
    return main, max(16, next_power_of_2(width - main)) if width > main else 0


def run(
    q_TNQ,
    k_nope_SNP,
    k_rope_SNR,
    v_SNV,
    query_start_B1,
    key_start_B1,
    *,
    max_query_len,
    scale,
    causal,
    accumulate=False,
    out_TNV=None,
    lse_TN=None,
):
    """Same contract as reference.prefill, but rows of `out_TNV` that no request owns keep what they held.

    All tensors may be strided, less the last dimension of queries, keys, values and output. `scale` is positive.
    """
    N = q_TNQ.shape[1]
    P, R, V = k_nope_SNP.shape[-1], k_rope_SNR.shape[-1], v_SNV.shape[-1]
    out_TNV, lse_TN = prefill_outputs(q_TNQ, V, out_TNV, lse_TN, accumulate=accumulate)
    require_adjacent(q=q_TNQ, k_nope=k_nope_SNP, k_rope=k_rope_SNR, v=v_SNV, out=out_TNV)
    device = device_of(q_TNQ)
    (P1, P2), (V1, V2) = _ranges(P), _ranges(V)
    R_PAD = max(16, next_power_of_2(R)) if R else 0
    tile = prefill_tile(device, q_TNQ.element_size(), P1 + P2 + R_PAD, V1 + V2)
    launch(
        _prefill_kernel, (cdiv(max_query_len, tile.queries), N, len(query_start_B1) - 1),
        q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, key_start_B1, out_TNV, lse_TN, scale * LOG2_E.value,
        *q_TNQ.stride()[:2], *k_nope_SNP.stride()[:2], *k_rope_SNR.stride()[:2], *v_SNV.stride()[:2],
        *out_TNV.stride()[:2], *lse_TN.stride(),
        P=P, P1=P1, P2=P2, R=R, R_PAD=R_PAD, V=V, V1=V1, V2=V2,
        BLOCK_M=tile.queries, BLOCK_K=tile.keys, CAUSAL=causal, ACCUMULATE=accumulate, UPCAST=device.interpreted,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_TNV, lse_TN
