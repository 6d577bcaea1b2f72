"""What vLLM's decode context parallelism needs of Triton and vLLM's CPU build lacks, in torch.

Arguments are those of vLLM's kernels, by vLLM's names; its dispatcher hands them over in that order.
"""

import torch

from mla_backend.shards import Shards, weight_of


def slot_mapping(
    num_tokens,
    max_num_tokens,
    query_start_loc,
    positions,
    block_table,
    block_table_stride,
    slot_mapping,
    KV_CACHE_BLOCK_SIZE,
    TOTAL_CP_WORLD_SIZE=1,
    TOTAL_CP_RANK=0,
    CP_KV_CACHE_INTERLEAVE_SIZE=1,
    PAD_ID=-1,
    BLOCK_SIZE=1024,
) -> None:
    """Where each token's row goes in this rank's cache, PAD_ID for those of other ranks."""
    shards = Shards(ranks=TOTAL_CP_WORLD_SIZE, rank=TOTAL_CP_RANK, interleave=CP_KV_CACHE_INTERLEAVE_SIZE)
    owned = int(query_start_loc[-1])
    token_T = torch.arange(owned, dtype=query_start_loc.dtype)
    request_T = torch.searchsorted(query_start_loc[1:].contiguous(), token_T, right=True)
    rank_T, row_T = shards.place(positions[:owned])
    page_T = block_table[request_T, row_T // KV_CACHE_BLOCK_SIZE].long()
    slot_T = page_T * KV_CACHE_BLOCK_SIZE + row_T % KV_CACHE_BLOCK_SIZE
    slot_mapping[:owned] = torch.where(rank_T == shards.rank, slot_T, PAD_ID)
    slot_mapping[num_tokens:max_num_tokens] = PAD_ID


CONSTANTS_OF_WEIGH_ANSWER = ("HEAD_DIM", "N_ROUNDED", "IS_BASE_E")


def weigh_answer(
    outputs,
    new_output,
    lses,
    vlse,
    outputs_stride_B,
    outputs_stride_H,
    outputs_stride_D,
    lses_stride_N,
    lses_stride_B,
    lses_stride_H,
    lse_idx,
    HEAD_DIM,
    N_ROUNDED,
    IS_BASE_E,
) -> None:
    """This rank's answers [tokens, heads, width] times what they count among all; lses are [ranks, tokens, heads]."""
    assert IS_BASE_E, "ours have natural logarithms"
    weight, total = weight_of(lses, lse_idx)
    new_output.copy_(torch.where(weight[..., None] > 0, outputs * weight[..., None], 0.0))
    vlse.copy_(total)
