"""The launch of Hopper's decode for an fp8 cache with one scale, with queries as columns: up to 32 of hopper_codes.py,
or 64 of hopper_turns.py.

Schedule and what is left to merge are those of decode/gluon_sm90.py.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_kernels.hopper import barrier
from mla_kernels.hopper_codes import accumulate
from mla_kernels.hopper_codes_load import gather_codes, load_codes
from mla_kernels.hopper_few import attend
from mla_kernels.hopper_launch import row_tiles
from mla_kernels.hopper_load import Cache
from mla_kernels.hopper_shared import allocate, allocate_turns
from mla_kernels.hopper_turns import take_turns
from mla_kernels.launching import launch
from mla_kernels.schedule import BLOCK, share


@gluon.jit(
    do_not_specialize=["batch", "parts", "query_len", "page_rows", "rows_per_slot", "stride_table", "stride8_page"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr", "plan_ptr", "lse_ptr", "scale_ptr"],
)
def _decode_codes_kernel(
    k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table,
    q_latent_ptr, q_rope_ptr, stride8_ql_t, stride8_ql_n, stride8_qr_t, stride8_qr_n,
    seq_lens_ptr, query_start_ptr, query_len, batch, parts, scale_log2,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    part_ptr, part_lse_ptr, plan_ptr, rows_per_slot, scale_ptr,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr,
    GATHER: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    ATTEND_REGS: gl.constexpr, ADDER_REGS: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    # All is in float16: e4m3 is exact in it, and weights lose less than in bfloat16.
    if F == 64:
        smem, q_s, q_rope_s = allocate_turns(GATHER, STAGES)
    else:
        weight_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * F, element_bitwidth=16, rank=2)
        smem, q_s, q_rope_s = allocate(gl.float16, F, [STEP * BLOCK, F], weight_lay, GATHER, STAGES, STEP)

    gdc_wait()  # for whoever wrote queries, cache or lengths
    gdc_launch_dependents()
    part = gl.program_id(1)
    shared, pieces, cuts, cuts_before = share(
        seq_lens_ptr, query_start_ptr, batch, part, parts, rows_per_slot, RAGGED, PIECE
    )  # fmt: skip
    barrier()

    work = (shared, (seq_lens_ptr, query_start_ptr, query_len))
    q = (q_latent_ptr, q_rope_ptr, (stride8_ql_t, stride8_ql_n), (stride8_qr_t, stride8_qr_n), q_s, q_rope_s)
    lse = (lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot)
    plan = (plan_ptr, pieces, cuts, cuts_before)
    out = (out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot)
    cache = Cache(k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table)
    if F == 64:
        gl.warp_specialize(
            [
                (gather_codes if GATHER else load_codes, (cache, work, smem, N, R, PAGE, RAGGED, F, STEP, STAGES, 0)),
                (take_turns, (q, lse, plan, out, scale_log2, scale_ptr, work, smem, 0, N, R, RAGGED, STAGES)),
                (take_turns, (q, lse, plan, out, scale_log2, scale_ptr, work, smem, 1, N, R, RAGGED, STAGES)),
            ],
            [4, 4],
            [ATTEND_REGS, ADDER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (gather_codes if GATHER else load_codes, (cache, work, smem, N, R, PAGE, RAGGED, F, STEP, STAGES, 0)),
                (attend, (q, lse, plan, scale_log2, scale_ptr, work, smem, N, F, R, RAGGED, False, STEP, STAGES, 0)),
                (accumulate, (out, work, smem, N, F, RAGGED, STEP, STAGES)),
            ],
            [4 * STEP, 8],
            [ATTEND_REGS, ADDER_REGS],
        )


class Roles(NamedTuple):
    """Blocks of a step, each with a warpgroup that attends; steps in shared memory; registers of a thread of those, and
    of the two warpgroups that add values up; PIECE of schedule.share (200 short requests and two long ones, 16 heads:
    72 us instead of 94). Of 64 columns: registers of either warpgroup. Loaders get what is left."""

    step: int
    stages: int
    attend_registers: int
    adder_registers: int
    piece: int


ROLES = {16: Roles(2, 2, 104, 120, 8), 32: Roles(2, 2, 104, 120, 8), 64: Roles(1, 3, 240, 240, 10)}  # by columns


def decode_codes(prepared, rows: int, columns: int, parts: int, part, part_lse, plan, cache_scale) -> None:
    """Start it for `rows` query rows of a request, in tiles of `columns`.

    prepared: hopper_launch.prepare_launch's.   parts: of the batch, for such tiles.
    """
    roles = ROLES[columns]
    launch(
        _decode_codes_kernel, (row_tiles(rows, columns), parts),
        *prepared.before_parts, parts, *prepared.behind_parts, part, part_lse, plan, rows, cache_scale,
        F=columns, GATHER=prepared.gather, **prepared.constants, STEP=roles.step, STAGES=roles.stages,
        ATTEND_REGS=roles.attend_registers, ADDER_REGS=roles.adder_registers, PIECE=roles.piece,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
