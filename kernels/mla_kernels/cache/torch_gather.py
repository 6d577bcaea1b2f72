"""Copy cached rows of each request side by side in plain torch, for CPU tensors.

1. output row -> request, by repeating each request's number;
2. output row -> token -> page and offset, through the block table;
3. one indexed read copies all rows, converted to the dtype of the output, those of an fp8 cache times its scale, or
   those of their tiles.
"""

import torch

from mla_kernels.packed_rows import unpack

# Shape suffixes: S output rows, B requests, A pages in the pool, G tokens a page, K values a row, M pages a request.


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def run(cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, *, max_key_len, cache_scale=None):
    """Same contract as reference.cache_gather."""
    page_size = cache_AGK.shape[1]
    first_S, end_S = key_start_B1[:-1].long(), key_start_B1[1:].long()
    request_S = torch.repeat_interleave(end_S - first_S)
    out_S = torch.arange(len(request_S)) + first_S[:1]
    token_S = out_S - first_S[request_S] + starts_B[request_S]
    page_S = block_table_BM[request_S, token_S // page_size].long()
    rows_SK = cache_AGK[page_S, token_S % page_size]
    if rows_SK.dtype == torch.uint8:
        rows_SK = unpack(rows_SK[None], out_SK.shape[1])[0]
    elif cache_scale is not None:
        rows_SK = rows_SK.float() * cache_scale
    out_SK[out_S] = rows_SK.to(out_SK.dtype)
    return out_SK
