"""Write new rows into the paged latent cache in plain torch, for CPU tensors.

1. slots outside the pool are left out;
2. latent and rotary key are joined and converted to the dtype of the cache, for fp8 divided by its scale before, and
   for tile-scaled rows by those of their tiles, which are joined too;
3. one indexed assignment stores all rows.
"""

import torch

from mla_kernels.packed_rows import e4m3, pack

# Shape suffixes: T new tokens, A pages in the pool, G tokens a page, L latent, R rope, K = L + R.


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def _rows(latent_TL, rope_TR, dtype, cache_scale):
    """New rows as a cache of `dtype` holds them."""
    if dtype == torch.uint8:
        return pack(latent_TL, rope_TR)
    rows_TK = torch.cat([latent_TL, rope_TR], -1)
    if dtype != torch.float8_e4m3fn:
        return rows_TK.to(dtype)
    return e4m3(rows_TK.float() if cache_scale is None else rows_TK.float() / cache_scale)


def run(kv_latent_TL, k_rope_TR, cache_AGK, slots_T, *, cache_scale=None):
    """Same contract as reference.cache_write. `slots_T` is int64 or int32."""
    pages, page_size, _ = cache_AGK.shape
    wanted = ((slots_T >= 0) & (slots_T < pages * page_size)).nonzero().flatten()
    slots = slots_T[wanted].long()
    rows = _rows(kv_latent_TL[wanted], k_rope_TR[wanted], cache_AGK.dtype, cache_scale)
    cache_AGK[slots // page_size, slots % page_size] = rows
