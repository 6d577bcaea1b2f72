"""Write new rows into the paged latent cache in plain torch, for CPU tensors.

1. slots outside the pool are left out;
2. latent and rotary key are joined and converted to the dtype of the cache, for fp8 divided by its scale before;
3. one indexed assignment stores all rows.
"""

import torch

# Shape suffixes: T new tokens, A pages in the pool, G tokens a page, L latent, R rope, K = L + R.


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def _to_e4m3(x, cache_scale):
    """Saturates: a plain conversion makes NaN of what is too large, in some versions of PyTorch."""
    most = torch.finfo(torch.float8_e4m3fn).max
    x = x.float() if cache_scale is None else x.float() / cache_scale
    return x.clamp(-most, most).to(torch.float8_e4m3fn)


def run(kv_latent_TL, k_rope_TR, cache_AGK, slots_T, *, cache_scale=None):
    """Same contract as reference.cache_write. `slots_T` is int64 or int32."""
    pages, page_size, _ = cache_AGK.shape
    wanted = ((slots_T >= 0) & (slots_T < pages * page_size)).nonzero().flatten()
    slots = slots_T[wanted].long()
    rows = torch.cat([kv_latent_TL[wanted], k_rope_TR[wanted]], -1)
    rows = _to_e4m3(rows, cache_scale) if cache_AGK.dtype == torch.float8_e4m3fn else rows.to(cache_AGK.dtype)
    cache_AGK[slots // page_size, slots % page_size] = rows
