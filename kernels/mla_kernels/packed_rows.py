"""Tile-scaled rows (cache_layout.PackedRow) in plain torch, for kernels on CPU tensors."""

import torch

from mla_kernels.cache_layout import LEAST_SCALE, TILE, packed_row

# Shape suffixes: T rows, L latent, R rope, K = L + R, I tiles of a row, J values of a tile, X bytes of a row.


def e4m3(x):
    """Saturates: a plain conversion makes NaN of what is too large, in some versions of PyTorch."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-most, most).to(torch.float8_e4m3fn)


def pack(latent_TL, rope_TR):
    """Rows of bytes, [T, X] in uint8."""
    value_TIJ = latent_TL.float().unflatten(-1, (-1, TILE))
    # Infinity is the largest number here and NaN has no size, so that both leave a tile's other values what they can.
    amax_TI1 = value_TIJ.abs().nan_to_num(nan=0.0).amax(-1, keepdim=True)
    least_TI1 = (amax_TI1 / torch.finfo(torch.float8_e4m3fn).max).clamp(min=LEAST_SCALE)
    scale_TI1 = (least_TI1.view(torch.int32) + 0x7FFFFF & 0x7F800000).view(torch.float32)  # up to a power of two
    parts = e4m3(value_TIJ / scale_TI1).flatten(1), scale_TI1.flatten(1), rope_TR.to(torch.bfloat16)
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


def unpack(cache_AGX, values: int):
    """What rows of bytes stand for, [A, G, K] in float32, where K is `values`."""
    row = packed_row(cache_AGX, values)
    code = cache_AGX[..., : row.scales_at].view(torch.float8_e4m3fn).float()
    scale = cache_AGX[..., row.scales_at : row.rope_at].view(torch.float32)
    latent = code.unflatten(-1, (-1, TILE)) * scale[..., None]
    rope = cache_AGX[..., row.rope_at :].view(torch.bfloat16).float()
    return torch.cat([latent.flatten(-2), rope], -1)
