"""Copy cached rows of each request side by side in Triton: any GPU that Triton supports, and its CPU interpreter.

One program for a few tokens of a request:
  1. find their pages in the block table; tokens past the request's last are skipped;
  2. copy their rows, a block of columns at a time, converted to the dtype of the output, those of an fp8 cache times
     its scale, and latent values of tile-scaled rows times that of their tile.
"""

import triton
import triton.language as tl

from mla_kernels.cache_layout import TILE, packed_row
from mla_kernels.device import Device
from mla_kernels.launching import launch
from mla_kernels.primitives import (
    as_codes,
    cdiv,
    from_cache,
    load_packed_rope,
    load_scale,
    load_tile_scales,
    next_power_of_2,
    refusals,
    require_adjacent,
)
from mla_kernels.repeats import repeat

# Shape suffixes: S output rows, B requests, A pages in the pool, G tokens a page, K values a row, M pages a request.

_TOKENS = 16
_COLUMNS = TILE


def unsupported(problem, device: Device) -> list[str]:
    return refusals(device, rows=problem.dtype, cache=problem.layout.format.dtype)


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["block_table_ptr", "starts_ptr", "key_start_ptr"],
)
def _gather_kernel(
    cache_ptr, block_table_ptr, starts_ptr, key_start_ptr, scale_ptr, out_ptr,
    stride_page, stride_row, stride_table, stride_out,
    K: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    ROPE_AT: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """K: values of a row; of a tile-scaled one the latent alone, behind which are ROPE_AT - K bytes of scales and R
    rotary values. ROPE_AT is 0 if rows are values."""
    request = tl.program_id(1)
    first_out = tl.load(key_start_ptr + request)
    count = tl.load(key_start_ptr + request + 1) - first_out
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    real = s < count
    token = tl.load(starts_ptr + request) + s
    page = tl.load(block_table_ptr + request.to(tl.int64) * stride_table + token // PAGE, mask=real, other=0)
    row_ptr = cache_ptr + (page.to(tl.int64) * stride_page + token % PAGE * stride_row)[:, None]
    out_ptr += ((first_out + s).to(tl.int64) * stride_out)[:, None]
    scale = load_scale(scale_ptr)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(row_ptr + k, mask=real[:, None] & (k < K), other=0)
        if ROPE_AT > 0:
            x = from_cache(x, tl.float32) * load_tile_scales(row_ptr, first // BLOCK_K, real[:, None], K)
        else:
            x = from_cache(x, tl.float32) * scale
        tl.store(out_ptr + k, x.to(out_ptr.dtype.element_ty), mask=real[:, None] & (k < K))
    if ROPE_AT > 0 and R > 0:
        r = tl.arange(0, R_PAD)[None, :]
        x = load_packed_rope(row_ptr, r, real[:, None] & (r < R), ROPE_AT)
        tl.store(out_ptr + K + r, x.to(out_ptr.dtype.element_ty), mask=real[:, None] & (r < R))


def run(cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, *, max_key_len, cache_scale=None):
    """Same contract as reference.cache_gather. max_key_len: most rows of any request."""
    repeat(_launch_gather, (max_key_len,), (cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, cache_scale))
    return out_SK


def _launch_gather(max_key_len, cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, cache_scale) -> None:
    require_adjacent(cache=cache_AGK, out=out_SK, block_table=block_table_BM)
    B = starts_B.shape[0]
    if max_key_len == 0 or B == 0:
        return
    K = out_SK.shape[1]
    row = packed_row(cache_AGK, K)
    values, rope_at, rope = (row.latent, row.rope_at, row.rope) if row else (K, 0, 0)
    launch(
        _gather_kernel, (cdiv(max_key_len, _TOKENS), B),
        as_codes(cache_AGK), block_table_BM, starts_B, key_start_B1, cache_scale, out_SK,
        *cache_AGK.stride()[:2], block_table_BM.stride()[0], out_SK.stride()[0],
        K=values, PAGE=cache_AGK.shape[1], BLOCK_S=_TOKENS, BLOCK_K=_COLUMNS,
        ROPE_AT=rope_at, R=rope, R_PAD=next_power_of_2(max(rope, 1)), num_warps=4,
    )  # fmt: skip
