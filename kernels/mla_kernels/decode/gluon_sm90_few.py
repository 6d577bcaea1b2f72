"""Absorbed decode for Hopper with few query rows, heads times query tokens, in Gluon: also of fp8 caches.

Of 16-bit caches gluon_sm90 does the same by itself. This takes fp8 caches too, converted to float16 on their way to
shared memory. So it has run on no GPU; converted to bfloat16, 128 x 4096 tokens with 16 heads took an H200 182 us, 687
with triton_splitkv, 109 with FlashMLA. MLA_BACKEND_DECODE=gluon_sm90_few takes it; why nothing else does: dispatch.py.
"""

import torch

from mla_kernels.device import Device
from mla_kernels.hopper import device_refusals
from mla_kernels.hopper_few_launch import COLUMNS, COLUMNS_FP8, columns_of, decode_few
from mla_kernels.hopper_launch import parts_of, prepare_launch, scratch_rows, scratch_shapes
from mla_kernels.primitives import E4M3, reaching_all, scratch
from mla_kernels.split_merge import merge_form, merge_parts


def unsupported(problem, device: Device) -> list[str]:
    reasons = device_refusals(device)
    geometry, layout = problem.geometry, problem.layout
    if problem.dtype not in (torch.bfloat16, torch.float16) or layout.format.dtype not in (problem.dtype, E4M3):
        got = f"{problem.dtype} and {layout.format.dtype}"
        reasons.append(f"needs bfloat16 or float16 queries, and a cache of the same or of float8_e4m3fn, got {got}")
    if geometry.kv_lora_rank != 512 or geometry.qk_rope_head_dim not in (0, 64):
        reasons.append(f"needs latent 512 + rope 64 or 0, got {geometry.kv_lora_rank} + {geometry.qk_rope_head_dim}")
    most = max(COLUMNS_FP8 if layout.format.dtype == E4M3 else COLUMNS)
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
        return columns_of(rows), merge_form(requests, parts_of(rows, device), rows)

    return reaching_all(forms, max_requests, query_lens)


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
    prepared = prepare_launch(
        q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B,
        scale=scale, query_len=query_len, query_start_B1=query_start_B1, out_TNL=out_TNL, lse_TN=lse_TN,
    )  # fmt: skip
    out_TNL, lse_TN = prepared.outputs
    if prepared.empty:
        return out_TNL, lse_TN
    rows = query_len * q_latent_TNL.shape[1]
    parts = parts_of(rows, prepared.device)
    part, part_lse, plan = scratch(
        workspace, scratch_shapes(scratch_rows(rows, prepared.device), prepared.device), cache_AGK.device
    )
    decode_few(prepared, rows, parts, part, part_lse, plan, cache_scale)
    merge_parts(
        out_TNL, lse_TN, part, part_lse, plan, query_start_B1,
        query_len=query_len, rows=rows, requests=len(seq_lens_B), parts=parts, num_sms=prepared.device.num_sms,
        overlap=True,
    )  # fmt: skip
    return out_TNL, lse_TN
