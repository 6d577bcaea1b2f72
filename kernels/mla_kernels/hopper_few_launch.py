"""The launch of Hopper's decode for few query rows: keys are rows of the matrix instructions, queries columns.

Schedule, loaders and what is left to merge are those of decode/gluon_sm90.py; the roles are in hopper_few.py.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_kernels.hopper import barrier
from mla_kernels.hopper_decode import ROWS
from mla_kernels.hopper_few import accumulate, attend
from mla_kernels.hopper_launch import row_tiles
from mla_kernels.hopper_load import Cache, gather_keys, load_keys
from mla_kernels.hopper_shared import allocate
from mla_kernels.launching import launch
from mla_kernels.schedule import BLOCK, share, share_splits

COLUMNS = (16, 32)  # query rows of a tile, which are columns here
PIECE = 2  # of schedule.share: 200 short requests and two long ones, 16 heads: 90 us instead of 94


@gluon.jit(
    do_not_specialize=[
        "batch",
        "parts",
        "query_len",
        "page_rows",
        "rows_per_slot",
        "stride_table",
        "stride8_page",
        "turn",
        "window",
    ],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr", "plan_ptr", "lse_ptr", "scale_ptr"],
)
def _decode_few_kernel(
    k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table,
    q_latent_ptr, q_rope_ptr, stride8_ql_t, stride8_ql_n, stride8_qr_t, stride8_qr_n,
    seq_lens_ptr, query_start_ptr, query_len, batch, parts, scale_log2,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    part_ptr, part_lse_ptr, plan_ptr, rows_per_slot, scale_ptr, turn, window,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr,
    GATHER: gl.constexpr, LOADER_WARPS: gl.constexpr, LOADER_REGS: gl.constexpr, ADDER_REGS: gl.constexpr,
    SPLIT: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    weight_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * F, element_bitwidth=16, rank=2)
    smem, q_s, q_rope_s = allocate(q_latent_ptr.dtype.element_ty, F, [BLOCK, F], weight_lay, GATHER)

    gdc_wait()  # for whoever wrote queries, cache or lengths
    gdc_launch_dependents()
    part = gl.program_id(1)
    if SPLIT > 0:
        shared = share_splits(seq_lens_ptr, batch, part, parts, turn, window, SPLIT)
        plan = shared  # there is none, and roles take no None
    else:
        shared, pieces, cuts, cuts_before = share(
            seq_lens_ptr, query_start_ptr, batch, part, parts, rows_per_slot, RAGGED, PIECE
        )  # fmt: skip
        plan = (plan_ptr, pieces, cuts, cuts_before)
    barrier()

    lengths = (seq_lens_ptr, query_start_ptr, query_len)
    work = (shared, lengths)
    to_load = ((shared[0], shared[1], shared[2], shared[3]), lengths)  # without slots: its registers are few
    q = (q_latent_ptr, q_rope_ptr, (stride8_ql_t, stride8_ql_n), (stride8_qr_t, stride8_qr_n), q_s, q_rope_s)
    lse = (lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot)
    out = (out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot)
    cache = Cache(k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table)
    gl.warp_specialize(
        [
            (attend, (q, lse, plan, scale_log2, scale_ptr, work, smem, N, F, R, RAGGED, GATHER, 0, 2, SPLIT)),
            (accumulate, (out, work, smem, N, F, RAGGED, GATHER, SPLIT)),
            (gather_keys if GATHER else load_keys, (cache, to_load, smem, N, R, PAGE, RAGGED, F)),
        ],
        [8, LOADER_WARPS],
        [ADDER_REGS, LOADER_REGS],
    )


def columns_of(rows: int) -> int:
    """Of a tile for so many query rows; those of fixed splits may be more than COLUMNS has."""
    return next((columns for columns in COLUMNS if rows <= columns), ROWS.value)


class Roles(NamedTuple):
    """Warps that load, registers of a thread of theirs and of those that add values up. The others get what is left of
    `registers` for each thread."""

    loader_warps: int
    loader_registers: int
    adder_registers: int
    registers: int = 128


def _roles_of_splits(prepared, columns: int) -> Roles:
    """With fixed splits: where a split begins and ends, what adds values up has more to remember."""
    if prepared.gather:
        return Roles(4, 56, 136) if columns == 16 else Roles(4, 40, 160)
    if columns == 16:
        return Roles(1, 40, 96, registers=96)
    return Roles(1, 24 if prepared.constants["PAGE"] >= BLOCK.value else 32, 160)


def roles_of(prepared, columns: int) -> Roles:
    if prepared.gather:
        return Roles(4, 56, 136)
    if columns == 16:
        # Leaves room for a program of the merge, which is then there when the last part ends.
        return Roles(1, 40, 88, registers=96)
    return Roles(1, 40, 144)


def decode_few(
    prepared, rows: int, columns: int, parts: int, part, part_lse, plan, cache_scale=None,
    *, turn=None, window=None, split=0,
) -> None:  # fmt: skip
    """Start it for `rows` query rows of a request, up to max(COLUMNS), or more with fixed splits.

    prepared: hopper_launch.prepare_launch's.   columns: of `columns_of`.   parts: of the batch, for such tiles.
    split: blocks of a fixed one; with it there are turns and no plan.
    """
    roles = _roles_of_splits(prepared, columns) if split else roles_of(prepared, columns)
    launch(
        _decode_few_kernel, (row_tiles(rows, columns), parts),
        *prepared.before_parts, parts, *prepared.behind_parts, part, part_lse, plan, rows, cache_scale, turn, window,
        F=columns, GATHER=prepared.gather, **prepared.constants,
        LOADER_WARPS=roles.loader_warps, LOADER_REGS=roles.loader_registers, ADDER_REGS=roles.adder_registers,
        SPLIT=split, PIECE=PIECE,
        num_warps=4, launch_pdl=True, **({"maxnreg": roles.registers} if roles.registers < 128 else {}),
    )  # fmt: skip
