"""Other people's MLA decode kernels, as vLLM calls them. Each takes a DecodeInputs and returns a function to time.

Imported only when asked for; a peer that is not installed or refuses a shape raises, which the benchmark notes.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DecodeInputs:
    """q_BQNK [requests, query tokens, heads, L + R], cache_AGK, block_table_BM and seq_lens_B (int32), latent width
    L."""

    q_BQNK: torch.Tensor
    cache_AGK: torch.Tensor
    block_table_BM: torch.Tensor
    seq_lens_B: torch.Tensor
    latent: int
    scale: float


def vllm_triton(data: DecodeInputs):
    """vLLM's TRITON_MLA: one query token a request."""
    from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    batch, query_len, heads, width = data.q_BQNK.shape
    if query_len > 1:
        raise NotImplementedError("one query token only")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    splits = _compute_num_kv_splits(int(data.seq_lens_B.max()), sms)
    q = data.q_BQNK.view(batch, heads, width)
    out = torch.zeros(batch, heads, data.latent, device=q.device, dtype=q.dtype)
    lse = torch.zeros(batch, heads, device=q.device, dtype=q.dtype)
    scratch = torch.empty(batch, heads, splits, data.latent + 1, device=q.device, dtype=torch.float32)
    rows, one = data.cache_AGK.unsqueeze(2), torch.ones(1, device=q.device)

    def call():
        decode_attention_fwd(
            q,
            rows,
            rows[..., : data.latent],
            out,
            lse,
            data.block_table_BM,
            data.seq_lens_B,
            scratch,
            splits,
            data.scale,
            rows.shape[1],
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )
        return out

    return call


def flashmla(data: DecodeInputs):
    """DeepSeek's FlashMLA, as vLLM ships it; its schedule is made by the first call and then reused."""
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    schedule, _ = get_mla_metadata()
    rows = data.cache_AGK.unsqueeze(2)
    return lambda: flash_mla_with_kvcache(
        data.q_BQNK,
        rows,
        data.block_table_BM,
        data.seq_lens_B,
        data.latent,
        schedule,
        None,
        softmax_scale=data.scale,
        causal=True,
    )


def fa3(data: DecodeInputs):
    """FlashAttention-3 with a latent query, as vLLM's FLASH_ATTN_MLA calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    batch, query_len, heads, _ = data.q_BQNK.shape
    starts = torch.arange(0, batch * query_len + 1, query_len, device=data.q_BQNK.device, dtype=torch.int32)
    flat = data.q_BQNK.reshape(batch * query_len, heads, -1)
    q_latent, q_rope = flat[..., : data.latent].contiguous(), flat[..., data.latent :].contiguous()
    longest = int(data.seq_lens_B.max())
    return lambda: flash_attn_varlen_func(
        q=q_rope,
        k=data.cache_AGK[..., data.latent :].unsqueeze(-2),
        v=data.cache_AGK[..., : data.latent].unsqueeze(-2),
        q_v=q_latent,
        max_seqlen_q=query_len,
        cu_seqlens_q=starts,
        max_seqlen_k=longest,
        seqused_k=data.seq_lens_B,
        block_table=data.block_table_BM,
        softmax_scale=data.scale,
        causal=True,
        return_softmax_lse=True,
        fa_version=3,
    )


DECODE = {"flashmla": flashmla, "fa3": fa3, "vllm_triton": vllm_triton}
