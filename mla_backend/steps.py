"""One forward step in the terms of no engine: the tensors that attention needs beside queries, keys and the cache.

An engine's metadata builder makes them once a step; all layers share them. Shape suffixes as in mla_kernels.reference.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """Requests whose few query tokens attend to the cache in latent space.

    block_table_BM: int32 page numbers.  seq_lens_B: int32, on the device, cached tokens with this step's.
    query_len: query tokens of every request, or the most of any if `query_start_B1` (int32) says where each begins.
    """

    block_table_BM: torch.Tensor
    seq_lens_B: torch.Tensor
    query_len: int
    query_start_B1: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ContextChunk:
    """A slice of cached context of neighbouring prefill requests, small enough to expand at once.

    requests, tokens: which prefill requests and which of the step's prefill tokens it is for.
    query_start_B1: starts of those requests' tokens within `tokens`, int32.   max_query_len: the longest.
    starts_B: first cached position of each request's slice, int32.
    key_start_B1: where its rows begin in the gathered chunk, int32; `num_keys` in all, `max_key_len` at most each.
    """

    requests: slice
    tokens: slice
    query_start_B1: torch.Tensor
    max_query_len: int
    starts_B: torch.Tensor
    key_start_B1: torch.Tensor
    max_key_len: int
    num_keys: int


@dataclass(frozen=True, kw_only=True)
class PrefillStep:
    """Requests whose new tokens attend to each other expanded, and to cached context chunk by chunk.

    query_start_B1: int32, starting at 0.  block_table_BM: int32.
    chunks: every (request, cached position) of the batch lies in exactly one.
    gather_buffer_SK: scratch that the largest chunk fits in; None when there are no chunks.
    """

    query_start_B1: torch.Tensor
    max_query_len: int
    block_table_BM: torch.Tensor
    chunks: tuple[ContextChunk, ...] = ()
    gather_buffer_SK: torch.Tensor | None = None
