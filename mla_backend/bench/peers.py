"""Other people's kernels. Each takes a DecodeInputs or PrefillInputs and returns a function to time, whose result is
the output or a pair of output and LSE.

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


@dataclass(frozen=True, kw_only=True)
class PrefillInputs:
    """What mla_kernels.reference.prefill takes: k_nope_SNP and v_SNV are views of one tensor, k_rope_SNR has one row
    for all heads. max_key_len: keys of the longest request, which a peer wants to know."""

    q_TNQ: torch.Tensor
    k_nope_SNP: torch.Tensor
    k_rope_SNR: torch.Tensor
    v_SNV: torch.Tensor
    query_start_B1: torch.Tensor
    key_start_B1: torch.Tensor
    max_query_len: int
    max_key_len: int
    causal: bool
    scale: float

    def peer_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys with the rotary part of every head behind its nope part, and values: contiguous both."""
        return torch.cat([self.k_nope_SNP, self.k_rope_SNR], -1), self.v_SNV.contiguous()


def vllm_triton(data: DecodeInputs):
    """vLLM's TRITON_MLA: one query token a request."""
    _need_one_scale(data)
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
    _need_one_scale(data)
    if data.cache_AGK.itemsize == 1:
        return _flashmla_fp8(data)
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


def _flashmla_fp8(data: DecodeInputs):
    """Of an fp8 cache: its queries are fp8 too, rounded here, and its schedule is made here; neither is timed."""
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache_fp8, get_mla_metadata_dense_fp8

    _, query_len, heads, _ = data.q_BQNK.shape
    schedule, splits = get_mla_metadata_dense_fp8(data.seq_lens_B, query_len * heads, 1)
    q, one = data.q_BQNK.to(data.cache_AGK.dtype), torch.ones(1, device=data.q_BQNK.device)
    rows = data.cache_AGK.unsqueeze(2)
    return lambda: flash_mla_with_kvcache_fp8(
        q, rows, data.block_table_BM, data.seq_lens_B, data.latent, schedule, splits, data.scale, True, one, one
    )


def _need_one_scale(data: DecodeInputs) -> None:
    if data.cache_AGK.dtype == torch.uint8:
        raise NotImplementedError("no tile-scaled caches in dense decode")


def _need_16_bits(data: DecodeInputs) -> None:
    if data.cache_AGK.itemsize == 1:
        raise NotImplementedError("16-bit caches only")


def fa3(data: DecodeInputs):
    """FlashAttention-3 with a latent query, as vLLM's FLASH_ATTN_MLA calls it."""
    _need_16_bits(data)
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


def page_lists(block_table_BM: torch.Tensor, seq_lens_B: torch.Tensor, page_size: int):
    """A block table as FlashInfer takes it: where each request's pages begin [B + 1], and all pages one after another.

    A request has as many pages as its tokens fill; what the table holds behind them is left out. Both int32.
    """
    pages_B = (seq_lens_B + page_size - 1) // page_size
    starts_B1 = torch.nn.functional.pad(pages_B.cumsum(0), (1, 0)).int()
    used_BM = torch.arange(block_table_BM.shape[1], device=block_table_BM.device) < pages_B[:, None]
    return starts_B1, block_table_BM[used_BM]


def flashinfer(data: DecodeInputs):
    """FlashInfer's MLA for Hopper; its plan is made here and not timed, as FlashMLA's schedule."""
    _need_16_bits(data)
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    batch, query_len, heads, width = data.q_BQNK.shape
    device, page_size = data.q_BQNK.device, data.cache_AGK.shape[1]
    starts, pages = page_lists(data.block_table_BM, data.seq_lens_B, page_size)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=device), backend="fa3")
    wrapper.plan(
        torch.arange(0, batch * query_len + 1, query_len, dtype=torch.int32, device=device),
        starts,
        pages,
        data.seq_lens_B,
        heads,
        data.latent,
        width - data.latent,
        page_size,
        True,  # causal: query tokens are the last of their request
        data.scale,
        data.q_BQNK.dtype,
        data.cache_AGK.dtype,
    )
    flat = data.q_BQNK.reshape(batch * query_len, heads, width)
    q_latent, q_rope = flat[..., : data.latent].contiguous(), flat[..., data.latent :].contiguous()
    latent_rows, rope_rows = data.cache_AGK[..., : data.latent], data.cache_AGK[..., data.latent :]
    return lambda: wrapper.run(q_latent, q_rope, latent_rows, rope_rows, return_lse=True)


DECODE = {"flashmla": flashmla, "fa3": fa3, "flashinfer": flashinfer, "vllm_triton": vllm_triton}


def fa3_prefill(data: PrefillInputs):
    """FlashAttention-3, as vLLM's FLASH_ATTN calls it for prefill."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    k_SNQ, v_SNV = data.peer_keys()
    return lambda: flash_attn_varlen_func(
        q=data.q_TNQ,
        k=k_SNQ,
        v=v_SNV,
        max_seqlen_q=data.max_query_len,
        cu_seqlens_q=data.query_start_B1,
        max_seqlen_k=data.max_key_len,
        cu_seqlens_k=data.key_start_B1,
        softmax_scale=data.scale,
        causal=data.causal,
        return_softmax_lse=True,
        fa_version=3,
    )


def flashinfer_prefill(data: PrefillInputs):
    """The best that FlashInfer has for the GPU, FlashAttention-3's way on Hopper; its plan is made here and not
    timed."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    k_SNQ, v_SNV = data.peer_keys()
    heads = data.q_TNQ.shape[1]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=data.q_TNQ.device)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="auto")
    wrapper.plan(
        qo_indptr=data.query_start_B1,
        kv_indptr=data.key_start_B1,
        num_qo_heads=heads,
        num_kv_heads=heads,
        head_dim_qk=k_SNQ.shape[-1],
        head_dim_vo=v_SNV.shape[-1],
        causal=data.causal,
        sm_scale=data.scale,
        q_data_type=data.q_TNQ.dtype,
    )
    return lambda: wrapper.run(data.q_TNQ, k_SNQ, v_SNV, return_lse=True)


PREFILL = {"fa3": fa3_prefill, "flashinfer": flashinfer_prefill}
