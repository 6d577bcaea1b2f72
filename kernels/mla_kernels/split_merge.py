"""Merging the partial answers of requests that schedule.py cut: plain Triton, launched while the decode kernel drains.

The plan that the decode kernel writes, int32: plan[0] is the number of cut requests, and plan[4 * (1 + i)] onwards say
of the i-th: request, the part that begins it, into how many parts it is cut. Its first piece lies in slot
2 * part + 1, the k-th after it in slot 2 * (part + k): normalised outputs, and their base-2 LSE.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_kernels.launching import launch
from mla_kernels.primitives import LN_2, cdiv

_PROGRAMS_PER_SM = 8


def plan_size(parts: int) -> int:
    """Integers of a plan for `parts` parts: at most parts - 1 requests can be cut."""
    return 4 * (parts + 1)


@triton.jit(
    do_not_specialize=["query_len", "rows_per_slot", "units", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["query_start_ptr", "plan_ptr"],
)
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, plan_ptr, query_start_ptr, query_len, rows_per_slot, units,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: tl.constexpr, L: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each cut request is `units` tasks of BLOCK_R query rows and COLUMNS of their columns. Programs take turns.

    Shape suffixes: S pieces at once, R rows, C columns.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tasks = tl.load(plan_ptr) * units
    entry = plan_ptr + 4 * (1 + tl.program_id(0) // units)  # perhaps of no request, but there is memory
    request, part, pieces = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    s_S, r_R, c_C = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_R), tl.arange(0, COLUMNS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        row_R = (task % units) // (L // COLUMNS) * BLOCK_R + r_R
        column = (task % units) % (L // COLUMNS) * COLUMNS
        first_token, tokens = request * query_len, query_len
        if RAGGED:
            first_token = tl.load(query_start_ptr + request)
            tokens = tl.load(query_start_ptr + request + 1) - first_token
        real_R = row_R < tl.minimum(tokens, query_len) * N  # tokens that were not announced have no scratch

        top_R = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        total_R = tl.zeros((BLOCK_R,), tl.float32)
        acc_RC = tl.zeros((BLOCK_R, COLUMNS), tl.float32)
        for begin in range(0, pieces, BLOCK_S):
            piece_S = begin + s_S
            here_SR = (piece_S < pieces)[:, None] & real_R[None, :]
            slot_S = (2 * (part + piece_S) + tl.where(piece_S == 0, 1, 0)).to(tl.int64)
            at_SR = slot_S[:, None] * rows_per_slot + row_R[None, :]
            lse_SR = tl.load(part_lse_ptr + at_SR, mask=here_SR, other=-float("inf"))
            at_SRC = at_SR[:, :, None] * L + (column + c_C)[None, None, :]
            values_SRC = tl.load(part_ptr + at_SRC, mask=here_SR[:, :, None], other=0.0)
            new_top_R = tl.maximum(top_R, tl.max(lse_SR, 0))
            shift_R = tl.where(new_top_R == -float("inf"), 0.0, new_top_R)
            rescale_R = tl.exp2(top_R - shift_R)
            weight_SR = tl.exp2(lse_SR - shift_R[None, :])
            total_R = total_R * rescale_R + tl.sum(weight_SR, 0)
            acc_RC = acc_RC * rescale_R[:, None] + tl.sum(values_SRC * weight_SR[:, :, None], 0)
            top_R = new_top_R

        safe_R = tl.where(total_R > 0, total_R, 1.0)
        token_R, head_R = (first_token + row_R // N).to(tl.int64), (row_R % N).to(tl.int64)
        at_out = (token_R * stride_out_t + head_R * stride_out_n)[:, None] + (column + c_C)[None, :]
        tl.store(out_ptr + at_out, (acc_RC / safe_R[:, None]).to(out_ptr.dtype.element_ty), mask=real_R[:, None])
        lse_R = (top_R + tl.log2(safe_R)) * LN_2
        tl.store(lse_ptr + token_R * stride_lse_t + head_R * stride_lse_n, lse_R, mask=real_R & (column == 0))
        entry = plan_ptr + 4 * (1 + tl.minimum(task + tl.num_programs(0), tasks - 1) // units)
        request, part, pieces = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


def merge_form(requests: int, parts: int, rows: int) -> tuple[int, int, int]:
    """(pieces, query rows, columns) that a program looks at at once, the fastest of 16 on an H200.

    Few forms, so that few kernels are compiled. With many pieces a request, all of them at once, for each step of the
    loop waits for memory; where tasks are many, larger ones, for what a task does beside loading takes time too.
    """
    if parts // requests >= 16:
        return (128, 1, 64) if requests * rows <= 64 else (32, 1, 256)
    return 8, 2, 512


def merge_parts(
    out_TNL, lse_TN, part_SML, part_lse_SM, plan, query_start_B1, *, query_len, rows, requests, parts, num_sms, overlap
) -> None:
    """Fill the rows of `out_TNL` and `lse_TN` (natural log) that belong to cut requests.

    part_SML, part_lse_SM: float32 slots of `rows` query rows each, flat.  plan: see above.
    query_start_B1: None if all requests have `query_len` query tokens.
    requests, parts: of the batch.  overlap: launch before the kernel ahead has ended (sm_90 and newer).
    """
    N, L = out_TNL.shape[1:]
    max_cuts = min(requests, parts)
    pieces, block_r, columns = merge_form(requests, parts, rows)
    columns = min(L, columns)
    units = cdiv(rows, block_r) * (L // columns)
    starts = plan if query_start_B1 is None else query_start_B1  # not read where all have as many
    launch(
        _merge_kernel, (min(_PROGRAMS_PER_SM * num_sms, max_cuts * units),),
        out_TNL, lse_TN, part_SML, part_lse_SM, plan, starts, query_len, rows, units,
        out_TNL.stride(0), out_TNL.stride(1), lse_TN.stride(0), lse_TN.stride(1),
        N=N, L=L, RAGGED=query_start_B1 is not None,
        BLOCK_S=pieces, BLOCK_R=block_r, COLUMNS=columns, PDL=overlap,
        num_warps=4, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
