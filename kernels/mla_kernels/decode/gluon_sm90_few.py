"""Absorbed decode for Hopper with few query rows, heads times query tokens, in Gluon: also of fp8 caches.

As gluon_sm90.py, which has its schedule, its loaders and its merge, but with keys as rows of the matrix instructions
and queries as columns (hopper_few.py). An fp8 cache is converted on its way to shared memory (hopper_convert.py).

It has not run on a GPU yet, so dispatch puts it last; MLA_BACKEND_DECODE=gluon_sm90_few takes it.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from mla_kernels.device import Device
from mla_kernels.hopper import barrier, device_refusals
from mla_kernels.hopper_convert import convert_keys
from mla_kernels.hopper_decode import allocate, write_plan
from mla_kernels.hopper_few import accumulate, attend
from mla_kernels.hopper_launch import parts_of, prepare_launch, scratch_rows, scratch_shapes
from mla_kernels.hopper_load import Cache, gather_keys, load_keys
from mla_kernels.primitives import E4M3, reaching_all, scratch
from mla_kernels.schedule import BLOCK, share
from mla_kernels.split_merge import merge_form, merge_parts

# Query rows of a tile, which are columns here. With 32 and an fp8 cache roles would need more registers than there are.
_COLUMNS, _COLUMNS_FP8 = (16, 32), (16,)


@gluon.jit(
    do_not_specialize=["batch", "parts", "query_len", "page_rows", "rows_per_slot", "stride_table", "stride8_page"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr", "plan_ptr", "lse_ptr", "scale_ptr"],
)
def _decode_few_kernel(
    k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table,
    q_latent_ptr, q_rope_ptr, stride8_ql_t, stride8_ql_n, stride8_qr_t, stride8_qr_n,
    seq_lens_ptr, query_start_ptr, query_len, batch, parts, scale_log2,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    part_ptr, part_lse_ptr, plan_ptr, rows_per_slot, scale_ptr,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr,
    GATHER: gl.constexpr, CONVERT: gl.constexpr,
    LOADER_WARPS: gl.constexpr, LOADER_REGS: gl.constexpr, ADDER_REGS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_latent_ptr.dtype.element_ty
    weight_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * F, element_bitwidth=16, rank=2)
    smem, q_s, q_rope_s = allocate(dtype, F, [BLOCK, F], weight_lay, GATHER)

    gdc_launch_dependents()
    part = gl.program_id(1)
    shared, pieces, cuts, cuts_before = share(
        seq_lens_ptr, query_start_ptr, batch, part, parts, rows_per_slot, RAGGED
    )  # fmt: skip
    write_plan(plan_ptr, part, shared[2], pieces, cuts, cuts_before)
    barrier()

    work = (shared, (seq_lens_ptr, query_start_ptr, query_len))
    q = (q_latent_ptr, q_rope_ptr, (stride8_ql_t, stride8_ql_n), (stride8_qr_t, stride8_qr_n), q_s, q_rope_s)
    lse = (lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot)
    out = (out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot)
    cache = Cache(k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table)
    gl.warp_specialize(
        [
            (attend, (q, lse, scale_log2, scale_ptr, work, smem, N, F, R, RAGGED, GATHER)),
            (accumulate, (out, work, smem, N, F, RAGGED, GATHER)),
            (
                convert_keys if CONVERT else gather_keys if GATHER else load_keys,
                (cache, work, smem, N, R, PAGE, RAGGED, F),
            ),
        ],
        [8, LOADER_WARPS],
        [ADDER_REGS, LOADER_REGS],
    )


def unsupported(problem, device: Device) -> list[str]:
    reasons = device_refusals(device)
    geometry, layout = problem.geometry, problem.layout
    if problem.dtype not in (torch.bfloat16, torch.float16) or layout.format.dtype not in (problem.dtype, E4M3):
        got = f"{problem.dtype} and {layout.format.dtype}"
        reasons.append(f"needs bfloat16 or float16 queries, and a cache of the same or of float8_e4m3fn, got {got}")
    if geometry.kv_lora_rank != 512 or geometry.qk_rope_head_dim not in (0, 64):
        reasons.append(f"needs latent 512 + rope 64 or 0, got {geometry.kv_lora_rank} + {geometry.qk_rope_head_dim}")
    most = (_COLUMNS_FP8 if layout.format.dtype == E4M3 else _COLUMNS)[-1]
    if (rows := geometry.num_heads * problem.max_query_len) > most:
        reasons.append(f"needs heads x query tokens of {most} or less with this cache, got {rows}")
    if problem.split_tokens:
        reasons.append(f"has no fixed splits, got splits of {problem.split_tokens} tokens")
    return reasons


def workspace(problem, device: Device, *, max_requests: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """As gluon_sm90.workspace, without fixed splits."""
    return scratch_shapes(scratch_rows(problem.geometry.num_heads * problem.max_query_len, device), device)


def variants(problem, device: Device, *, max_requests: int, query_lens) -> list[tuple[int, int]]:
    """As gluon_sm90.variants."""

    def forms(requests, query_len):
        rows = query_len * problem.geometry.num_heads
        return _columns(rows), merge_form(requests, parts_of(rows, device), rows)

    return reaching_all(forms, max_requests, query_lens)


def _warps(launch) -> tuple[int, int, int]:
    """Warps of the loader, registers of its threads, and of those that add values up. The others get what is left."""
    if launch.codes:
        return 4, 104, 112
    return (4, 56, 136) if launch.gather else (1, 40, 144)


def _columns(rows: int) -> int:
    return next(columns for columns in _COLUMNS if rows <= columns)


def run(
    q_latent_TNL,
    q_rope_TNR,
    cache_AGK,
    block_table_BM,
    seq_lens_B,
    *,
    scale,
    query_len=1,
    query_start_B1=None,
    out_TNL=None,
    lse_TN=None,
    workspace=None,
    cache_scale=None,
):
    """Same contract as reference.decode, but rows of `out_TNL` that no request owns keep what they held."""
    launch = prepare_launch(
        q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B,
        scale=scale, query_len=query_len, query_start_B1=query_start_B1, out_TNL=out_TNL, lse_TN=lse_TN,
    )  # fmt: skip
    out_TNL, lse_TN = launch.outputs
    if launch.empty:
        return out_TNL, lse_TN
    rows = query_len * q_latent_TNL.shape[1]
    parts = parts_of(rows, launch.device)
    part, part_lse, plan = scratch(
        workspace, scratch_shapes(scratch_rows(rows, launch.device), launch.device), cache_AGK.device
    )
    loader_warps, loader_registers, adder_registers = _warps(launch)
    _decode_few_kernel[(1, parts)](
        *launch.before_parts, parts, *launch.behind_parts, part, part_lse, plan, rows, cache_scale,
        F=_columns(rows), GATHER=launch.gather, CONVERT=launch.codes, **launch.constants,
        LOADER_WARPS=loader_warps, LOADER_REGS=loader_registers, ADDER_REGS=adder_registers, num_warps=4,
    )  # fmt: skip
    merge_parts(
        out_TNL, lse_TN, part, part_lse, plan, query_start_B1,
        query_len=query_len, rows=rows, requests=len(seq_lens_B), parts=parts, num_sms=launch.device.num_sms,
        overlap=True,
    )  # fmt: skip
    return out_TNL, lse_TN
