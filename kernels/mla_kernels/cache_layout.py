"""What a row, a page and a pool of the latent cache are. The only place that knows their bytes.

A row holds one token of one layer: `kv_lora_rank` latent values, then `qk_rope_head_dim` rotary key values,
shared by all heads. A page is `page_size` consecutive rows; pages of one layer lie `page_stride` elements
apart, which may be more than a page when an engine interleaves layers.

In one format, `fp8_ds_mla`, a row is bytes of three kinds; `PackedRow` says where each lies.

MLA makes a row small, not constant: the cache still grows linearly with the number of tokens.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from mla_kernels.geometry import MLAGeometry

TILE = 128  # latent values of a packed row that share a scale
LEAST_SCALE = 1e-4  # of a packed row's tile, before it is rounded up to a power of two


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Bytes of a tile-scaled row: `latent` e4m3 codes, a float32 scale for each tile of 128 of them, and `rope` values
    in bfloat16, whatever dtype the model has.

    For 512 + 64 that is FlashMLA's and vLLM's row of 656 bytes (FlashMLA, docstring of flash_mla_with_kvcache; vLLM,
    v1/attention/backends/mla/flashmla_sparse.py). A code stands for its value times its tile's scale. Writers take the
    smallest power of two that is max(amax / 448, LEAST_SCALE) or more (vLLM since its pull request 49435, FlashMLA's
    tests/quant.py); readers take any scale, as older writers left them.
    Raises ValueError for widths that give no such row.
    """

    latent: int
    rope: int

    def __post_init__(self) -> None:
        if self.latent % TILE or self.rope % 2:  # an odd rope would leave the next row's scales across float32 words
            raise ValueError(
                f"a tile-scaled row needs a latent in multiples of {TILE} and an even rope, got {self.latent} and "
                f"{self.rope}"
            )

    @property
    def scales_at(self) -> int:
        return self.latent

    @property
    def rope_at(self) -> int:
        return self.latent + self.latent // TILE * torch.float32.itemsize

    @property
    def bytes(self) -> int:
        return self.rope_at + self.rope * torch.bfloat16.itemsize


@cache
def _packed_row(row_bytes: int, values: int) -> PackedRow:
    latent = (values * torch.bfloat16.itemsize - row_bytes) * TILE // (TILE - torch.float32.itemsize)
    row = PackedRow(latent=latent, rope=values - latent)
    if row.bytes != row_bytes:
        raise ValueError(f"no tile-scaled row of {row_bytes} bytes holds {values} values")
    return row


def packed_row(cache_AGK: torch.Tensor, values: int) -> PackedRow | None:
    """The rows of a tile-scaled cache, which hold so many values each, latent and rope; None for any other cache.

    Raises ValueError for bytes that are no such rows, and for rows whose scales lie across float32 words.
    """
    if cache_AGK.dtype != torch.uint8:
        return None
    apart = [cache_AGK.storage_offset(), *cache_AGK.stride()[:2]]
    if any(distance % torch.float32.itemsize for distance in apart):
        raise ValueError(f"tile-scaled pages and rows must lie at multiples of 4 bytes, got {apart}")
    return _packed_row(cache_AGK.shape[2], values)


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """How the values of a row are stored.

    name: what users and logs call it.
    dtype: torch dtype of the cache tensor as kernels see it.
    scaled: a value x stands for x * cache_scale, with one factor for a whole layer.
    packed: rows are bytes, as `PackedRow` says, and bring their own scales.
    """

    name: str
    dtype: torch.dtype
    scaled: bool = False
    packed: bool = False

    def row_elements(self, geometry: MLAGeometry) -> int:
        """Elements of `dtype` in one row. Raises ValueError for a geometry that the format cannot hold."""
        if self.packed:
            return PackedRow(latent=geometry.kv_lora_rank, rope=geometry.qk_rope_head_dim).bytes
        return geometry.latent_dim

    def holds(self, geometry: MLAGeometry) -> bool:
        """Whether there are such rows for a geometry."""
        try:
            return self.row_elements(geometry) > 0
        except ValueError:
            return False


FORMATS = {
    f.name: f
    for f in (
        CacheFormat(name="bf16", dtype=torch.bfloat16),
        CacheFormat(name="fp16", dtype=torch.float16),
        CacheFormat(name="fp32", dtype=torch.float32),
        CacheFormat(name="fp8", dtype=torch.float8_e4m3fn, scaled=True),
        CacheFormat(name="fp8_ds_mla", dtype=torch.uint8, packed=True),
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
        self.format.row_elements(self.geometry)  # or a ValueError

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
