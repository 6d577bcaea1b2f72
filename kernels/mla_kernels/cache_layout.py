"""What a row, a page and a pool of the latent cache are. The only place that knows their bytes.

A row holds one token of one layer: `kv_lora_rank` latent values, then `qk_rope_head_dim` rotary key values,
shared by all heads. A page is `page_size` consecutive rows; pages of one layer lie `page_stride` elements
apart, which may be more than a page when an engine interleaves layers.

MLA makes a row small, not constant: the cache still grows linearly with the number of tokens.
"""

import math
from dataclasses import dataclass

import torch

from mla_kernels.geometry import MLAGeometry


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """How the values of a row are stored.

    name: what users and logs call it.
    dtype: torch dtype of the cache tensor as kernels see it.
    scaled: a value x stands for x * cache_scale, with one factor for a whole layer.
    """

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def row_elements(self, geometry: MLAGeometry) -> int:
        """Elements of `dtype` in one row."""
        return geometry.latent_dim


FORMATS = {
    f.name: f
    for f in (
        CacheFormat(name="bf16", dtype=torch.bfloat16),
        CacheFormat(name="fp16", dtype=torch.float16),
        CacheFormat(name="fp32", dtype=torch.float32),
        CacheFormat(name="fp8", dtype=torch.float8_e4m3fn, scaled=True),
    )
}


def format_of(dtype: torch.dtype) -> CacheFormat:
    """The format whose cache tensors have this dtype. Raises ValueError for a dtype without one."""
    for candidate in FORMATS.values():
        if candidate.dtype == dtype:
            return candidate
    known = ", ".join(f"{f.name} ({f.dtype})" for f in FORMATS.values())
    raise ValueError(f"no latent cache format stores {dtype}; choose one of {known}")


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The latent cache of one layer: a geometry, a format and a page size in tokens."""

    geometry: MLAGeometry
    format: CacheFormat
    page_size: int

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"page_size must be 1 token or more, got {self.page_size}")

    @property
    def row_elements(self) -> int:
        return self.format.row_elements(self.geometry)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.row_elements * self.format.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.row_bytes

    def shape(self, num_pages: int) -> tuple[int, int, int]:
        """[pages, page_size, row elements]: the tensor that kernels take."""
        return (num_pages, self.page_size, self.row_elements)

    def check(self, cache: torch.Tensor) -> None:
        """Raise ValueError unless `cache` is a cache of this layout; all reasons at once."""
        wanted = self.shape(cache.shape[0] if cache.dim() else 0)
        wrong = []
        if tuple(cache.shape) != wanted:
            wrong.append(f"shape must be (pages, {wanted[1]}, {wanted[2]}), got {tuple(cache.shape)}")
        if cache.dtype != self.format.dtype:
            wrong.append(f"dtype must be {self.format.dtype}, got {cache.dtype}")
        if cache.dim() == 3 and cache.shape[2] > 1 and cache.stride(2) != 1:
            wrong.append(f"values of a row must be adjacent, got stride {cache.stride(2)}")
        if wrong:
            raise ValueError(f"not a {self.format.name} latent cache: {'; '.join(wrong)}")

    def tokens_in(self, num_bytes: int, *, num_layers: int = 1) -> int:
        """Tokens that fit in `num_bytes` when `num_layers` layers cache them: whole pages only."""
        return num_bytes // (self.page_bytes * num_layers) * self.page_size

    def bytes_for(self, tokens: int, *, num_layers: int = 1) -> int:
        """Bytes that `tokens` tokens of one request take in `num_layers` layers: linear, in whole pages."""
        return -(-tokens // self.page_size) * self.page_bytes * num_layers


def expanded_bytes_per_token(geometry: MLAGeometry, dtype: torch.dtype, *, kv_heads: int | None = None) -> int:
    """Cache bytes a token and layer if the same model cached expanded heads instead of the latent.

    kv_heads: key/value heads cached; None means one for every query head (MHA). GQA with 8 groups is 8,
        MQA is 1. `geometry.num_heads` must then be the model's heads, not one rank's.
    Each head stores a key of P + R and a value of V elements.
    """
    heads = geometry.num_heads if kv_heads is None else kv_heads
    if not 1 <= heads <= geometry.num_heads:
        raise ValueError(f"kv_heads must be 1 to {geometry.num_heads} (the query heads), got {heads}")
    return heads * (geometry.qk_head_dim + geometry.v_head_dim) * dtype.itemsize


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize
