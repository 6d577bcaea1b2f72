"""Write new rows into the paged latent cache in Triton: any GPU that Triton supports, and its CPU interpreter.

One program for a few tokens:
  1. read their slots; a slot outside the pool is skipped;
  2. find page and offset, and the address, in 64 bits;
  3. copy the latent, then the rotary key behind it, converted to the dtype of the cache, for fp8 divided by its scale
     before; of tile-scaled rows by a scale for each 128 latent values, which is written too.
"""

import triton
import triton.language as tl

from mla_kernels.cache_layout import LEAST_SCALE, TILE, packed_row
from mla_kernels.device import Device
from mla_kernels.launching import launch
from mla_kernels.primitives import as_codes, cdiv, load_scale, next_power_of_2, refusals, require_adjacent, to_cache
from mla_kernels.repeats import repeat

# Shape suffixes: T new tokens, A pages in the pool, G tokens a page, L latent, R rope, K = L + R.

_TILE, _LEAST_SCALE = tl.constexpr(TILE), tl.constexpr(LEAST_SCALE)
_TOKENS = 4  # a program: enough bytes in flight, and enough programs for a decode batch


def unsupported(problem, device: Device) -> list[str]:
    return refusals(device, rows=problem.dtype, cache=problem.layout.format.dtype)


@triton.jit(do_not_specialize=["tokens", "slots_in_pool"], do_not_specialize_on_alignment=["slots_ptr"])
def _write_kernel(
    latent_ptr, rope_ptr, cache_ptr, slots_ptr, scale_ptr, tokens, slots_in_pool,
    stride_latent, stride_rope, stride_page, stride_row, stride_slot,
    L: tl.constexpr, L_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr, ROPE_AT: tl.constexpr,
):  # fmt: skip
    """ROPE_AT: bytes before the rotary key of a tile-scaled row; 0 if rows are values."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slots_ptr + t * stride_slot, mask=t < tokens, other=-1).to(tl.int64)
    wanted = ((slot >= 0) & (slot < slots_in_pool))[:, None]
    row_ptr = cache_ptr + (slot // PAGE * stride_page + slot % PAGE * stride_row)[:, None]
    scale = load_scale(scale_ptr)
    c = tl.arange(0, L_PAD)[None, :]
    x = tl.load(latent_ptr + t[:, None] * stride_latent + c, mask=wanted & (c < L), other=0.0)
    if ROPE_AT > 0:
        scale = _store_tile_scales(row_ptr, x.to(tl.float32), wanted, L, L_PAD, BLOCK_T)
    tl.store(row_ptr + c, to_cache(x, scale, cache_ptr.dtype.element_ty), mask=wanted & (c < L))
    if R > 0:
        r = tl.arange(0, R_PAD)[None, :]
        x = tl.load(rope_ptr + t[:, None] * stride_rope + r, mask=wanted & (r < R), other=0.0)
        if ROPE_AT > 0:
            bits_ptr = (row_ptr + ROPE_AT).to(tl.pointer_type(tl.int16))
            tl.store(bits_ptr + r, _bfloat16_bits(x), mask=wanted & (r < R))
        else:
            tl.store(row_ptr + L + r, to_cache(x, scale, cache_ptr.dtype.element_ty), mask=wanted & (r < R))


@triton.jit
def _store_tile_scales(row_ptr, x, wanted, L: tl.constexpr, L_PAD: tl.constexpr, T: tl.constexpr):
    """Write the scale of each tile of x [T, L_PAD] behind a row's codes. Returns that of each value, [T, L_PAD].

    Integer arithmetic, in which infinity is the largest number and NaN has no size, so that both leave a tile's other
    values what they can; and the logarithm of a number just above a power of two needs no rounding.
    """
    tiles: tl.constexpr = L_PAD // _TILE
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    magnitude = tl.where(magnitude > 0x7F800000, 0, tl.minimum(magnitude, 0x7F7FFFFF))
    amax = tl.max(tl.reshape(magnitude, (T, tiles, _TILE)), 2).to(tl.float32, bitcast=True)
    least = tl.maximum(tl.div_rn(amax, 448.0), _LEAST_SCALE)
    scale = ((least.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tile = tl.arange(0, tiles)[None, :]
    tl.store((row_ptr + L).to(tl.pointer_type(tl.float32)) + tile, scale, mask=wanted & (tile < L // _TILE))
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (T, tiles, _TILE)), (T, L_PAD))


@triton.jit
def _bfloat16_bits(x):
    """`x` rounded to bfloat16, ties to even, which the interpreter does not do by itself."""
    if x.dtype == tl.bfloat16:
        rounded = x.to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)  # NaN stays NaN
    return rounded.to(tl.int16)


def run(kv_latent_TL, k_rope_TR, cache_AGK, slots_T, *, cache_scale=None):
    """Same contract as reference.cache_write. Rows of all tensors may be strided; `slots_T` is int64 or int32."""
    repeat(_launch_write, (), (kv_latent_TL, k_rope_TR, cache_AGK, slots_T, cache_scale))


def _launch_write(kv_latent_TL, k_rope_TR, cache_AGK, slots_T, cache_scale) -> None:
    require_adjacent(kv_latent=kv_latent_TL, k_rope=k_rope_TR, cache=cache_AGK)
    pages, page_size, _ = cache_AGK.shape
    tokens, L, R = slots_T.shape[0], kv_latent_TL.shape[-1], k_rope_TR.shape[-1]
    if tokens == 0:
        return
    row = packed_row(cache_AGK, L + R)
    launch(
        _write_kernel, (cdiv(tokens, _TOKENS),),
        kv_latent_TL, k_rope_TR, as_codes(cache_AGK), slots_T, cache_scale, tokens, pages * page_size,
        kv_latent_TL.stride()[0], k_rope_TR.stride()[0], *cache_AGK.stride()[:2], *slots_T.stride(),
        L=L, L_PAD=next_power_of_2(L), R=R, R_PAD=next_power_of_2(max(R, 1)),
        PAGE=page_size, BLOCK_T=_TOKENS, ROPE_AT=row.rope_at if row else 0, num_warps=4,
    )  # fmt: skip
