"""What the launches of Hopper's decode kernels share: checks, the cache's TMA descriptor, arguments, scratch."""

from functools import lru_cache
from typing import NamedTuple

import torch

from mla_kernels.cache_layout import packed_row
from mla_kernels.device import Device, device_of
from mla_kernels.hopper_codes_load import BOX, SCALES
from mla_kernels.hopper_load import LATENT, TILE
from mla_kernels.primitives import E4M3, LOG2_E, cdiv, require_adjacent
from mla_kernels.schedule import BLOCK
from mla_kernels.split_merge import plan_size
from mla_kernels.tma import describe

_TMA_SMALL_PAGES = (16, 32)  # smaller than a block: several boxes


def row_tiles(rows: int, height: int) -> int:
    """Tiles of `height` query rows that a request has."""
    return cdiv(rows, height)


def parts_of(rows: int, height: int, device: Device) -> int:
    """Parts that the batch is cut into, so that every tile of query rows has one program for each."""
    return max(1, device.num_sms // row_tiles(rows, height))


def scratch_rows(rows: int, height: int, device: Device) -> int:
    parts = parts_of(rows, height, device)
    return 2 * parts * rows if parts > 1 else 0  # one part has the whole batch: no request is cut


def scratch_shapes(rows: int, device: Device):
    """(shape, dtype) of partial outputs, their base-2 LSE, the plan."""
    plan = plan_size(device.num_sms)
    return ((rows * LATENT.value,), torch.float32), ((rows,), torch.float32), ((plan,), torch.int32)


def in_16_bytes(q: torch.Tensor) -> torch.Tensor:
    """`q`, or a copy if its rows do not begin at multiples of 16 bytes, which asynchronous copies need."""
    fits = q.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in q.stride()[:-1])
    return q if fits or q.numel() == 0 else q.clone(memory_format=torch.contiguous_format)


class _Form(NamedTuple):
    """What launches have in common whose tensors differ in where they lie alone: those of a step's layers, say.

    adjacent: whether values of a row are, in all tensors.
    cache_in_16, queries_in_16: whether all rows begin at multiples of 16 bytes if the first does.
    box: what `describe` wants of the pool as one long list of rows, beside its address; None where no box fits.
    scale_box: the same for scales of tile-scaled rows.
    page_rows: rows from a page to the next, where there is a box.   cache_strides, query_strides: in 16 bytes.
    """

    adjacent: bool
    cache_in_16: bool
    queries_in_16: bool
    box: tuple | None
    scale_box: tuple | None
    page_rows: int
    cache_strides: tuple[int, ...]
    query_strides: tuple[int, ...]
    constants: dict


@lru_cache(256)
def _form(
    cache: tuple, q_latent: tuple, q_rope: tuple, table: tuple, codes: bool, packed: bool, words: bool, ragged: bool
) -> _Form:
    """cache: dtype, shape and strides.   q_latent, q_rope, table: shape and strides."""
    dtype, (pages, page_size, width), (stride_page, stride_token, _) = cache
    stride_page = stride_page if pages > 1 else 0  # of a single page it says nothing
    in_16 = 16 if codes else 8  # values of 16 bytes
    box, scale_box, page_rows = None, None, 0
    if (
        not words
        and (page_size % BLOCK.value == 0 or page_size in _TMA_SMALL_PAGES)
        and stride_page % stride_token == 0
    ):
        page_rows = stride_page // stride_token
        rows = (pages - 1) * page_rows + page_size
        dtype = torch.int8 if codes else dtype  # as the kernel calls codes
        height = min(page_size, BLOCK.value)
        box = dtype, (rows, width), stride_token, (height, (BOX if codes else TILE).value)
        scale_box = (dtype, (rows, width), stride_token, (height, SCALES.value)) if packed else None
    queries = [(shape, stride) for shape, strides in (q_latent, q_rope) for stride in strides[:-1]]
    return _Form(
        adjacent=all(strides[-1] == 1 or shape[-1] <= 1 for *_, shape, strides in (cache, q_latent, q_rope, table)),
        cache_in_16=stride_page % in_16 == 0 and stride_token % in_16 == 0,
        queries_in_16=all(stride % 8 == 0 or 0 in shape for shape, stride in queries),
        box=box,
        scale_box=scale_box,
        page_rows=page_rows,
        cache_strides=(stride_page // in_16, stride_token // in_16),
        query_strides=tuple(stride // 8 for _, stride in queries),
        constants={"N": q_latent[0][1], "R": q_rope[0][-1], "PAGE": page_size, "RAGGED": ragged},
    )


class Launch(NamedTuple):
    """Of a kernel whose arguments are `before_parts`, the number of parts, `behind_parts`, then scratch.

    empty: there is nothing to do.   codes: the cache is fp8 with one scale, as int8.   packed: it is fp8 in rows that
    bring their scales, as int8 or as words.   gather: no TMA box fits its pages.   scales: a TMA descriptor of scales.
    """

    empty: bool
    device: Device
    codes: bool
    packed: bool
    gather: bool
    scales: object
    before_parts: tuple
    behind_parts: tuple
    constants: dict


def prepare_launch(
    q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B,
    *, scale, query_len, query_start_B1, out_TNL, lse_TN, in_words,
) -> Launch:  # fmt: skip
    """in_words: tile-scaled rows are read word by word (hopper_unpack.py), not copied as they are.

    Raises ValueError for what no kernel can read: rows that are not adjacent, or not at multiples of 16 bytes.
    """
    ragged, requests = query_start_B1 is not None, seq_lens_B.shape[0]
    packed = packed_row(cache_AGK, q_latent_TNL.shape[-1] + q_rope_TNR.shape[-1]) is not None
    codes = packed or cache_AGK.dtype == E4M3
    words = packed and in_words
    form = _form(
        (cache_AGK.dtype, cache_AGK.shape, cache_AGK.stride()),
        (q_latent_TNL.shape, q_latent_TNL.stride()),
        (q_rope_TNR.shape, q_rope_TNR.stride()),
        (block_table_BM.shape, block_table_BM.stride()),
        codes,
        packed,
        words,
        ragged,
    )
    if not form.adjacent:
        require_adjacent(q_latent=q_latent_TNL, q_rope=q_rope_TNR, cache=cache_AGK, block_table=block_table_BM)
    address = cache_AGK.data_ptr()
    if address % 16 or not form.cache_in_16:
        raise ValueError(f"cache rows must begin at multiples of 16 bytes, got strides {cache_AGK.stride()}")
    if not form.queries_in_16 or (q_latent_TNL.data_ptr() | q_rope_TNR.data_ptr()) % 16:
        return prepare_launch(
            in_16_bytes(q_latent_TNL), in_16_bytes(q_rope_TNR), cache_AGK, block_table_BM, seq_lens_B,
            scale=scale, query_len=query_len, query_start_B1=query_start_B1, out_TNL=out_TNL, lse_TN=lse_TN,
            in_words=in_words,
        )  # fmt: skip
    empty = requests == 0 or q_latent_TNL.shape[0] == 0
    memory = cache_AGK.view(torch.int32 if words else torch.int8) if codes else cache_AGK
    return Launch(
        empty=empty,
        device=device_of(cache_AGK),
        codes=codes and not packed,
        packed=packed,
        gather=form.box is None and not words,
        scales=describe(address, *form.scale_box) if form.scale_box and not empty else None,
        before_parts=(
            describe(address, *form.box) if form.box and not empty else None, form.page_rows,
            memory, *form.cache_strides,
            block_table_BM, block_table_BM.stride()[0], q_latent_TNL, q_rope_TNR, *form.query_strides,
            seq_lens_B, query_start_B1 if ragged else seq_lens_B,  # not read when all have query_len tokens
            query_len, requests,
        ),
        behind_parts=(scale * LOG2_E.value, out_TNL, *out_TNL.stride()[:2], lse_TN, *lse_TN.stride()),
        constants=form.constants,
    )  # fmt: skip
