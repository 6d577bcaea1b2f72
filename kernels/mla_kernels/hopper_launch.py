"""What the launches of Hopper's decode kernels share: checks, the cache's TMA descriptor, arguments, scratch."""

from typing import NamedTuple

import torch

from mla_kernels.cache_layout import packed_row
from mla_kernels.device import Device, device_of
from mla_kernels.hopper_load import LATENT
from mla_kernels.primitives import E4M3, LOG2_E, cdiv, decode_outputs, require_adjacent
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


def _describe(cache_AGK: torch.Tensor, stride_page: int):
    """(TMA descriptor of the pool as one long list of rows, rows from a page to the next); None where no box fits."""
    pages, page_size, width = cache_AGK.shape
    stride_token = cache_AGK.stride(1)
    if (page_size % BLOCK.value and page_size not in _TMA_SMALL_PAGES) or stride_page % stride_token:
        return None, 0
    page_rows = stride_page // stride_token
    rows = (pages - 1) * page_rows + page_size
    box = (min(page_size, BLOCK.value), 128 // cache_AGK.itemsize)
    return describe(cache_AGK.data_ptr(), cache_AGK.dtype, (rows, width), stride_token, box), page_rows


class Launch(NamedTuple):
    """Of a kernel whose arguments are `before_parts`, the number of parts, `behind_parts`, then scratch.

    empty: there is nothing to do.   codes: the cache is fp8, as words.   packed: in rows that bring their scales.
    gather: no TMA box fits its pages.
    """

    outputs: tuple
    empty: bool
    device: Device
    codes: bool
    packed: bool
    gather: bool
    before_parts: tuple
    behind_parts: tuple
    constants: dict


def prepare_launch(
    q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B,
    *, scale, query_len, query_start_B1, out_TNL, lse_TN,
) -> Launch:  # fmt: skip
    """Raises ValueError for what no kernel can read: rows that are not adjacent, or not at multiples of 16 bytes."""
    (T, N), B, R = q_latent_TNL.shape[:2], len(seq_lens_B), q_rope_TNR.shape[-1]
    ragged = query_start_B1 is not None
    outputs = out_TNL, lse_TN = decode_outputs(
        q_latent_TNL, B, query_len, ragged=ragged, out_TNL=out_TNL, lse_TN=lse_TN
    )
    require_adjacent(q_latent=q_latent_TNL, q_rope=q_rope_TNR, cache=cache_AGK, block_table=block_table_BM)
    stride_page = cache_AGK.stride(0) if len(cache_AGK) > 1 else 0  # of a single page it says nothing
    packed = packed_row(cache_AGK, q_latent_TNL.shape[-1] + R) is not None
    codes = packed or cache_AGK.dtype == E4M3
    in_16 = 16 if codes else 8  # values of 16 bytes
    if cache_AGK.data_ptr() % 16 or stride_page % in_16 or cache_AGK.stride(1) % in_16:
        raise ValueError(f"cache rows must begin at multiples of 16 bytes, got strides {cache_AGK.stride()}")
    empty = B == 0 or T == 0
    memory = cache_AGK.view(torch.int32 if packed else torch.int8) if codes else cache_AGK
    k_desc, page_rows = (None, 0) if packed or empty else _describe(memory, stride_page)
    q_latent, q_rope = in_16_bytes(q_latent_TNL), in_16_bytes(q_rope_TNR)
    return Launch(
        outputs=outputs,
        empty=empty,
        device=device_of(cache_AGK),
        codes=codes,
        packed=packed,
        gather=k_desc is None and not packed,
        before_parts=(
            k_desc, page_rows, memory,
            stride_page // in_16, cache_AGK.stride(1) // in_16, block_table_BM, block_table_BM.stride(0),
            q_latent, q_rope, *(q.stride(d) // 8 for q in (q_latent, q_rope) for d in (0, 1)),
            seq_lens_B, query_start_B1 if ragged else seq_lens_B,  # not read when all have query_len tokens
            query_len, B,
        ),
        behind_parts=(
            scale * LOG2_E.value,
            out_TNL, out_TNL.stride(0), out_TNL.stride(1), lse_TN, lse_TN.stride(0), lse_TN.stride(1),
        ),
        constants={"N": N, "R": R, "PAGE": cache_AGK.shape[1], "RAGGED": ragged},
    )  # fmt: skip
