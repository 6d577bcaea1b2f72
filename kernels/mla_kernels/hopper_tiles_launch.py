"""The launch of Hopper's decode for tile-scaled rows with up to 32 query rows, which are columns (hopper_tiles.py).

Schedule and what is left to merge are those of decode/gluon_sm90.py.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_kernels.hopper import barrier
from mla_kernels.hopper_codes_load import TileCache, gather_codes, load_codes
from mla_kernels.hopper_launch import row_tiles
from mla_kernels.hopper_shared import allocate_tiles
from mla_kernels.hopper_tiles import accumulate, attend
from mla_kernels.launching import launch
from mla_kernels.schedule import share


@gluon.jit(
    do_not_specialize=["batch", "parts", "query_len", "page_rows", "rows_per_slot", "stride_table", "stride8_page"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr", "plan_ptr", "lse_ptr"],
)
def _decode_tiles_kernel(
    scale_desc, k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table,
    q_latent_ptr, q_rope_ptr, stride8_ql_t, stride8_ql_n, stride8_qr_t, stride8_qr_n,
    seq_lens_ptr, query_start_ptr, query_len, batch, parts, scale_log2,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    part_ptr, part_lse_ptr, plan_ptr, rows_per_slot,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr,
    GATHER: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, ROPES: gl.constexpr,
    ATTEND_REGS: gl.constexpr, ADDER_REGS: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    smem, q_s, q_rope_s = allocate_tiles(q_latent_ptr.dtype.element_ty, F, GATHER, STEP, STAGES, ROPES)

    gdc_wait()  # for whoever wrote queries, cache or lengths
    gdc_launch_dependents()
    part = gl.program_id(1)
    shared, pieces, cuts, cuts_before = share(
        seq_lens_ptr, query_start_ptr, batch, part, parts, rows_per_slot, RAGGED, PIECE
    )  # fmt: skip
    barrier()

    work = (shared, (seq_lens_ptr, query_start_ptr, query_len))
    q = (q_latent_ptr, q_rope_ptr, (stride8_ql_t, stride8_ql_n), (stride8_qr_t, stride8_qr_n), q_s, q_rope_s.index(0))
    lse = (lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot)
    plan = (plan_ptr, pieces, cuts, cuts_before)
    out = (out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot)
    cache = TileCache(k_desc, scale_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table)
    gl.warp_specialize(
        [
            (gather_codes if GATHER else load_codes, (cache, work, smem, N, R, PAGE, RAGGED, F, STEP, STAGES, ROPES)),
            (attend, (q, q_rope_s, lse, plan, scale_log2, work, smem, N, F, R, RAGGED, STEP, STAGES, ROPES)),
            (accumulate, (out, work, smem, 0, N, F, RAGGED, STEP, STAGES)),
            (accumulate, (out, work, smem, 1, N, F, RAGGED, STEP, STAGES)),
        ],
        [4 * STEP, 4, 4],
        [ATTEND_REGS, ADDER_REGS, ADDER_REGS],
    )


class Roles(NamedTuple):
    """Blocks of a step, each with a warpgroup that attends; steps in shared memory, and of how many of them rotary
    values; registers of a thread of those that attend, and of the two warpgroups that add values up; PIECE of
    schedule.share, as for codes with one scale. Loaders get what is left."""

    step: int
    stages: int
    ropes: int
    attend_registers: int
    adder_registers: int
    piece: int


# By columns. With 32 there is no room for more rotary values; only scores need them, so they are gone soon.
ROLES = {16: Roles(2, 2, 2, 120, 104, 8), 32: Roles(2, 2, 1, 120, 104, 8)}


def decode_tiles(prepared, rows: int, columns: int, parts: int, part, part_lse, plan) -> None:
    """Start it for `rows` query rows of a request, in tiles of `columns`.

    prepared: hopper_launch.prepare_launch's.   parts: of the batch, for such tiles.
    """
    roles = ROLES[columns]
    spared = 8 if prepared.gather and columns == 16 else 0  # for loaders, which copy row by row then
    launch(
        _decode_tiles_kernel, (row_tiles(rows, columns), parts),
        prepared.scales, *prepared.before_parts, parts, *prepared.behind_parts, part, part_lse, plan, rows,
        F=columns, GATHER=prepared.gather, **prepared.constants, STEP=roles.step, STAGES=roles.stages,
        ROPES=roles.ropes, ATTEND_REGS=roles.attend_registers - spared, ADDER_REGS=roles.adder_registers,
        PIECE=roles.piece, num_warps=4, launch_pdl=True,
    )  # fmt: skip
