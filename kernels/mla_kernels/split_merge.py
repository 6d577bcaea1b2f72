"""Merging the partial answers of requests that schedule.py cut: plain Triton, launched while the decode kernel drains.

The plan that the decode kernel writes, int32: plan[0] is the number of cut requests, and plan[4 * (1 + i)] onwards say
of the i-th: request, the part that begins it, into how many parts it is cut. Its first piece lies in slot
2 * part + 1, the k-th after it in slot 2 * (part + k): normalised outputs, and their base-2 LSE.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mla_kernels.primitives import LN_2

_VALUES = 4096  # partial values that a program looks at at once
_PROGRAMS_PER_SM = 8
_COLUMNS = (32, 128, 512)  # that a program merges: few sizes, so that few kernels are compiled


def plan_size(parts: int) -> int:
    """Integers of a plan for `parts` parts: at most parts - 1 requests can be cut."""
    return 4 * (parts + 1)


@triton.jit(
    do_not_specialize=["query_len", "rows_per_slot", "units"],
    do_not_specialize_on_alignment=["query_start_ptr", "plan_ptr"],
)
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, plan_ptr, query_start_ptr, query_len, rows_per_slot, units,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: tl.constexpr, L: tl.constexpr, RAGGED: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each cut request is `units` tasks: a query row and COLUMNS of its columns. Programs take turns."""
    if PDL:
        gdc_wait()
    tasks = tl.load(plan_ptr) * units
    entry = plan_ptr + 4 * (1 + tl.program_id(0) // units)  # perhaps of no request, but there is memory
    request, part, pieces = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, COLUMNS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        row = (task % units) // (L // COLUMNS)
        column = (task % units) % (L // COLUMNS)
        first_token, tokens = request * query_len, query_len
        if RAGGED:
            first_token = tl.load(query_start_ptr + request)
            tokens = tl.load(query_start_ptr + request + 1) - first_token
        if row < tokens * N:
            top = -float("inf")
            total = 0.0
            acc = tl.zeros((COLUMNS,), tl.float32)
            for begin in range(0, pieces, BLOCK_S):
                here = begin + s < pieces
                slot = 2 * (part + begin + s) + tl.where(begin + s == 0, 1, 0)
                at = slot.to(tl.int64) * rows_per_slot + row
                lse = tl.load(part_lse_ptr + at, mask=here, other=-float("inf"))
                values = tl.load(
                    part_ptr + at[:, None] * L + (column * COLUMNS + c)[None, :], mask=here[:, None], other=0.0
                )
                new_top = tl.maximum(top, tl.max(lse, 0))
                shift = tl.where(new_top == -float("inf"), 0.0, new_top)
                rescale = tl.exp2(top - shift)
                weight = tl.exp2(lse - shift)
                total = total * rescale + tl.sum(weight, 0)
                acc = acc * rescale + tl.sum(values * weight[:, None], 0)
                top = new_top
            safe = tl.where(total > 0, total, 1.0)
            token, head = (first_token + row // N).to(tl.int64), (row % N).to(tl.int64)
            at_out = token * stride_out_t + head * stride_out_n + column * COLUMNS + c
            tl.store(out_ptr + at_out, (acc / safe).to(out_ptr.dtype.element_ty))
            if column == 0:
                tl.store(lse_ptr + token * stride_lse_t + head * stride_lse_n, (top + tl.log2(safe)) * LN_2)
        entry = plan_ptr + 4 * (1 + tl.minimum(task + tl.num_programs(0), tasks - 1) // units)
        request, part, pieces = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


def merge_parts(
    out_TNL, lse_TN, part_SML, part_lse_SM, plan, query_start_B1, *, query_len, rows, max_cuts, num_sms, overlap
) -> None:
    """Fill the rows of `out_TNL` and `lse_TN` (natural log) that belong to cut requests.

    part_SML, part_lse_SM: float32 slots of `rows` query rows each, flat.  plan: see above.
    query_start_B1: None if all requests have `query_len` query tokens.
    max_cuts: most requests that can be cut.  overlap: launch before the kernel ahead has ended (sm_90 and newer).
    """
    N, L = out_TNL.shape[1:]
    columns = min(L, next((n for n in _COLUMNS if n * 1024 >= L * max_cuts * rows), _COLUMNS[-1]))
    units = rows * (L // columns)
    starts = plan if query_start_B1 is None else query_start_B1  # not read where all have as many
    _merge_kernel[(min(_PROGRAMS_PER_SM * num_sms, max_cuts * units),)](
        out_TNL, lse_TN, part_SML, part_lse_SM, plan, starts, query_len, rows, units,
        out_TNL.stride(0), out_TNL.stride(1), lse_TN.stride(0), lse_TN.stride(1),
        N=N, L=L, RAGGED=query_start_B1 is not None, BLOCK_S=_VALUES // columns, COLUMNS=columns, PDL=overlap,
        num_warps=4, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
