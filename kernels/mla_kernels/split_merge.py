"""Merging the partial answers of requests that schedule.py cut, in Gluon: launched while the decode kernel drains.

The plan that the decode kernel writes, int32: plan[0] is the number of cut requests, and plan[4 * (1 + i)] onwards say
of the i-th: request, the part that begins it, into how many parts it is cut. Its first piece lies in slot
2 * part + 1, the k-th after it in slot 2 * (part + k): normalised outputs, and their base-2 LSE.

All that a call of few requests waits for here follows one another, so it counts how long each step takes: weights are
computed by every warp for itself, and threads meet once, to add up what they have.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_kernels.launching import launch
from mla_kernels.primitives import LN_2

_PROGRAMS_PER_SM = 8


def plan_size(parts: int) -> int:
    """Integers of a plan for `parts` parts: at most parts - 1 requests can be cut."""
    return 4 * (parts + 1)


@gluon.jit
def _weights(lse, top):
    return gl.exp2(lse - gl.where(top == -float("inf"), 0.0, top))


@gluon.jit
def _rows_of(part, piece, row, rows_per_slot):
    """Where row `row` of some pieces lies in the scratch, which 32 bits reach all of."""
    return (2 * (part + piece) + gl.where(piece == 0, 1, 0)) * rows_per_slot + row


@gluon.jit(
    do_not_specialize=["query_len", "rows_per_slot", "units", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["query_start_ptr", "plan_ptr"],
)
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, plan_ptr, query_start_ptr, query_len, rows_per_slot, units,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: gl.constexpr, L: gl.constexpr, RAGGED: gl.constexpr, PIECES: gl.constexpr, COLUMNS: gl.constexpr,
    LANES: gl.constexpr,
):  # fmt: skip
    """Each cut request is `units` tasks of a query row and COLUMNS of its columns. Programs take turns.

    PIECES: looked at at once.  LANES: of a warp that share a row, with four columns each.
    Shape suffixes: S pieces at once, C columns; A as S, but every warp has all.
    """
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [4, 1], [1, 0])
    all_lay: gl.constexpr = gl.BlockedLayout([PIECES // 32 if PIECES > 32 else 1], [32], [4], [0])
    s_S = gl.arange(0, PIECES, gl.SliceLayout(1, lay))
    s_A = gl.arange(0, PIECES, all_lay)
    c_C = gl.arange(0, COLUMNS, gl.SliceLayout(0, lay))
    weight_s = gl.allocate_shared_memory(gl.float32, [PIECES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    cut = gl.program_id(0) // units
    unit = gl.program_id(0) % units

    gdc_wait()
    gdc_launch_dependents()
    tasks = gl.load(plan_ptr) * units
    entry = plan_ptr + 4 * (1 + cut)  # perhaps of no request, but there is memory
    request, part, pieces = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        row = unit // (L // COLUMNS)
        column = unit % (L // COLUMNS) * COLUMNS
        token, tokens = request * query_len, query_len
        if RAGGED:
            token = gl.load(query_start_ptr + request)
            tokens = gl.load(query_start_ptr + request + 1) - token
        if row < gl.minimum(tokens, query_len) * N:  # tokens that were not announced have no scratch
            top = -float("inf")
            total = 0.0
            acc_C = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(0, lay))
            for begin in range(0, pieces, PIECES):
                at_A = _rows_of(part, begin + s_A, row, rows_per_slot)
                lse_A = gl.load(part_lse_ptr + at_A, mask=begin + s_A < pieces, other=-float("inf"))
                at_SC = _rows_of(part, begin + s_S, row, rows_per_slot)[:, None] * L + (column + c_C)[None, :]
                value_SC = gl.load(part_ptr + at_SC, mask=(begin + s_S < pieces)[:, None], other=0.0)
                new_top = gl.maximum(top, gl.max(lse_A, 0))
                rescale = _weights(top, new_top)
                weight_A = _weights(lse_A, new_top)
                total = total * rescale + gl.sum(weight_A, 0)
                weight_s.store(weight_A)  # behind which all values are on their way: nothing is done with them yet
                acc_C = acc_C * rescale + gl.sum(value_SC * weight_s.load(gl.SliceLayout(1, lay))[:, None], 0)
                top = new_top

            safe = gl.where(total > 0, total, 1.0)
            share = 1.0 / safe
            token += row // N
            head = row % N
            at_out = out_ptr + token.to(gl.int64) * stride_out_t + head * stride_out_n
            gl.store(at_out + column + c_C, (acc_C * share).to(out_ptr.dtype.element_ty))
            if column == 0:
                at_lse = lse_ptr + token.to(gl.int64) * stride_lse_t + head.to(gl.int64) * stride_lse_n
                gl.store(at_lse, (top + gl.log2(safe)) * LN_2)
        following = gl.minimum(task + gl.num_programs(0), tasks - 1)
        unit = following % units
        entry = plan_ptr + 4 * (1 + following // units)
        request, part, pieces = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)


def merge_form(requests: int, parts: int, rows: int) -> tuple[int, int]:
    """(pieces, columns) of a query row that a program looks at at once.

    Few forms, so that few kernels are compiled. With many pieces a request, all of them at once, for each step of the
    loop waits for memory; where tasks are many, larger ones, for what a task does beside loading takes time too.
    """
    if parts // requests >= 16:
        return (128, 64) if requests * rows <= 64 else (32, 256)
    return 8, 512


def merge_parts(
    out_TNL, lse_TN, part_SML, part_lse_SM, plan, query_start_B1, *, query_len, rows, requests, parts, num_sms
) -> None:
    """Fill the rows of `out_TNL` and `lse_TN` (natural log) that belong to cut requests.

    part_SML, part_lse_SM: float32 slots of `rows` query rows each, flat.  plan: see above.
    query_start_B1: None if all requests have `query_len` query tokens.
    requests, parts: of the batch.
    """
    N, L = out_TNL.shape[1:]
    max_cuts = min(requests, parts)
    pieces, columns = merge_form(requests, parts, rows)
    columns = min(L, columns)
    units = rows * (L // columns)
    starts = plan if query_start_B1 is None else query_start_B1  # not read where all have as many
    launch(
        _merge_kernel, (min(_PROGRAMS_PER_SM * num_sms, max_cuts * units),),
        out_TNL, lse_TN, part_SML, part_lse_SM, plan, starts, query_len, rows, units,
        out_TNL.stride(0), out_TNL.stride(1), lse_TN.stride(0), lse_TN.stride(1),
        N=N, L=L, RAGGED=query_start_B1 is not None, PIECES=pieces, COLUMNS=columns, LANES=min(32, columns // 4),
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
