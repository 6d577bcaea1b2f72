"""Room for a step of ours in what vLLM's profile of memory counts.

In its profile run vLLM allocates what the up-projection of its own largest chunk of cached context would take, and
calls nothing of ours before 0.33. So our chunks are smaller, and all that a step of ours allocates fits into that.
"""

import math

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder

from mla_backend.memory import CONTEXT_ROWS, most_bytes
from mla_backend.steps import TILES_AT_ONCE, tile_tokens
from mla_backend.vllm_adapter import compat
from mla_backend.vllm_adapter.backend import max_decode_query_len
from mla_kernels import Problem, tensor_bytes


def context_rows(vllm_config) -> int:
    """Cached rows that prefill gathers and expands at a time: half of vLLM's at most, whole pages, and as many of each
    rank that shares the cache."""
    vllms_own = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(vllm_config)
    parallel = vllm_config.parallel_config
    unit = vllm_config.cache_config.block_size
    if parallel.decode_context_parallel_size > 1:
        unit = math.lcm(unit, parallel.decode_context_parallel_size * parallel.cp_kv_cache_interleave_size)
    least = unit if compat.packs_context() else unit * vllm_config.scheduler_config.max_num_seqs
    return max(least, min(vllms_own // 2, CONTEXT_ROWS) // unit * unit)


def step_bytes(vllm_config, problem: Problem) -> int:
    """Bytes that a step of ours can take beside decode scratch."""
    scheduler = vllm_config.scheduler_config
    tokens, geometry = scheduler.max_num_batched_tokens, problem.geometry
    ranks = vllm_config.parallel_config.decode_context_parallel_size
    if problem.split_tokens:  # all tokens go to decode, and vLLM makes their absorbed queries meanwhile
        absorbed = tensor_bytes((tokens, geometry.num_heads, geometry.kv_lora_rank), problem.dtype)
        rows = context_rows(vllm_config)  # of a buffer that vLLM makes, and that then nobody needs
        tables = table_bytes(vllm_config, problem)
        return absorbed + tables + most_bytes(problem, tokens=0, decode_tokens=tokens, context_rows=rows)
    latent_tokens = 0 if ranks > 1 else min(tokens, TILES_AT_ONCE * tile_tokens(geometry.num_heads))
    step = most_bytes(
        problem,
        tokens=tokens,
        decode_tokens=min(tokens, scheduler.max_num_seqs * max_decode_query_len(vllm_config.speculative_config)),
        context_rows=context_rows(vllm_config),
        latent_tokens=latent_tokens,
        ranks=ranks,
    )
    return step + (table_bytes(vllm_config, problem) if latent_tokens else 0)


def table_bytes(vllm_config, problem: Problem) -> int:
    """Bytes of the block tables of a step's tiles, if all of its tokens are in tiles and one request is the longest."""
    tiles = -(-vllm_config.scheduler_config.max_num_batched_tokens // tile_tokens(problem.geometry.num_heads))
    pages = -(-vllm_config.model_config.max_model_len // vllm_config.cache_config.block_size)
    return tensor_bytes((tiles, pages), torch.int32)


def concatenated_bytes(vllm_config, problem: Problem) -> int:
    """Bytes of the keys of a step or of a chunk of context that a model's own layer concatenates beside that."""
    rows = max(vllm_config.scheduler_config.max_num_batched_tokens, context_rows(vllm_config))
    return tensor_bytes((rows, problem.geometry.num_heads, problem.geometry.qk_head_dim), problem.dtype)


def profiled_bytes(vllm_config, problem: Problem) -> int:
    """Bytes that vLLM's profile run allocates for a layer's chunk of context."""
    geometry = problem.geometry
    rows = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(vllm_config)
    widths = geometry.num_heads, geometry.qk_nope_head_dim + geometry.v_head_dim
    return tensor_bytes((rows, *widths), problem.dtype)
