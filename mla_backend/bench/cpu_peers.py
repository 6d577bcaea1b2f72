"""vLLM's own MLA attention for CPUs, called as its layers call it. Needs vLLM's CPU build; peers.py says the rest."""

from types import SimpleNamespace

import torch

from mla_backend.bench.peers import DecodeInputs, PrefillInputs


def cpu_mla(data: DecodeInputs):
    """CPU_MLA: any x86 processor, and the only one for float32."""
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    return _decode(CPUMLAImpl, data, SimpleNamespace(block_table=data.block_table_BM, seq_lens=data.seq_lens_B))


def amx_mla(data: DecodeInputs):
    """AMX_MLA, which vLLM takes by itself where there is AMX. What its builder makes once a step is made here."""
    if not torch.cpu._is_amx_tile_supported():
        raise NotImplementedError("needs AMX, which this processor has not")
    if data.q_BQNK.dtype != torch.bfloat16:
        raise NotImplementedError(f"bfloat16 only, not {data.q_BQNK.dtype}")
    from vllm.v1.attention.backends.mla import amx_mla

    longest = int(data.seq_lens_B.max())
    step = SimpleNamespace(
        req_to_token=amx_mla._expand_block_table(data.block_table_BM, data.cache_AGK.shape[1]),
        seq_lens_i64=data.seq_lens_B.long(),
        req_pool_indices=torch.arange(len(data.seq_lens_B)),
        num_kv_splits=amx_mla._compute_num_kv_splits(longest, torch.get_num_threads()),
    )
    return _decode(amx_mla.AMXMLAImpl, data, step)


def _decode(kind: type, data: DecodeInputs, step: SimpleNamespace):
    batch, query_len, heads, width = data.q_BQNK.shape
    if query_len > 1:
        raise NotImplementedError("one query token only")
    impl = object.__new__(kind)  # its __init__ wants a model
    impl.scale, impl.kv_lora_rank, impl.head_size, impl.num_heads = data.scale, data.latent, width, heads
    parts = data.q_BQNK.view(batch, heads, width).split([data.latent, width - data.latent], -1)
    metadata = SimpleNamespace(decode=step)
    return lambda: impl.forward_mqa(parts, data.cache_AGK, metadata, None)[0]


def cpu_sdpa(data: PrefillInputs):
    """CPU_SDPA_MLA, the prefill of CPU_MLA. Keys of one piece are made in the call, as its layer makes them."""
    from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

    if not data.causal:
        raise NotImplementedError("new tokens only: CPU_MLA caches no prefix")
    backend = object.__new__(CPUSDPAMLAPrefillBackend)
    backend.scale, backend._prefill_metadata = data.scale, SimpleNamespace(query_start_loc=data.query_start_B1)

    def call():
        keys = torch.cat([data.k_nope_SNP, data.k_rope_SNR], -1)
        return backend.run_prefill_new_tokens(data.q_TNQ, keys, data.v_SNV, return_softmax_lse=False)

    return call


PEERS = {"decode": {"cpu_mla": cpu_mla, "amx_mla": amx_mla}, "prefill": {"cpu_mla": cpu_sdpa}}
