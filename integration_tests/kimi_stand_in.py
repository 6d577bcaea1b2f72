"""Kimi-Linear in vLLM on a CPU: what its layers want of a GPU, in torch.

`stand_in()` replaces the kernels beside attention (linear attention, concatenation with the write of the cache, the
gather of cached context) and takes the prefill backend of the user's choice, which vLLM does on a GPU alone. What
remains is vLLM's own: layers, cache groups, batches, and calls of MLA backends.
"""

import os
from collections.abc import Mapping

import torch


class _Nothing:
    """A stream or event of a GPU that is not there."""

    def __init__(self, *_, **__):
        pass


def stand_in() -> None:
    """Call before the engine is made."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.mamba.gdn import kimi_gdn_linear_attn as linear
    from vllm.models.kimi_k3.nvidia import mla
    from vllm.models.kimi_k3.nvidia.ops.third_party import kda
    from vllm.triton_utils import dispatcher

    os.environ["VLLM_KIMI_K3_GEMM_AR"] = "0"  # a kernel that multiplies and adds up over ranks
    # vLLM (0.32) looks through the attributes of all that modules hold, and libraries that cffi opened have none; this
    # model's modules bring one in.
    dispatcher.vars = lambda value: value.__dict__ if isinstance(value.__dict__, Mapping) else {}
    torch.cuda.Stream = torch.cuda.Event = _Nothing
    mla.fused_mla_key_concat_kv_cache_insert = _keys_and_write
    mla.fused_mla_decode_q_concat_kv_cache_insert = _queries_and_write
    mla.fused_mla_kv_concat = _keys
    mla.get_mla_prefill_backend = _chosen_prefill
    _keep_weight(mla.MultiHeadLatentAttention)
    _custom_ops.gather_and_maybe_dequant_cache = _gather
    linear.gather_initial_states = _initial_states
    kda.chunk_kda_with_fused_gate = _linear_prefill
    kda.fused_recurrent_kda_packed_decode = _linear_decode


def _chosen_prefill(vllm_config):
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

    return (vllm_config.attention_config.mla_prefill_backend or MLAPrefillBackendEnum.CPU).get_class()


def _keep_weight(layer_class) -> None:
    """On a CPU vLLM packs the weights of projections for a matrix product of its own, all but those that the usual MLA
    layer marks."""
    init = layer_class.__init__

    def marked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.kv_b_proj._cpu_skip_gemm_dispatch = True

    layer_class.__init__ = marked


def _write(kv_latent_TL, k_rope_TR, cache_AGK, slots_T) -> None:
    wanted = slots_T >= 0
    pages, offsets = slots_T[wanted] // cache_AGK.shape[1], slots_T[wanted] % cache_AGK.shape[1]
    cache_AGK[pages, offsets] = torch.cat([kv_latent_TL, k_rope_TR.flatten(1)], -1)[wanted]


def _keys(k_nope_TNP, k_rope_TR) -> torch.Tensor:
    k_rope_TNR = k_rope_TR.reshape(len(k_rope_TR), 1, -1).expand(-1, k_nope_TNP.shape[1], -1)
    return torch.cat([k_nope_TNP, k_rope_TNR], -1)


def _keys_and_write(q, k_nope_TNP, k_rope_TR, kv_latent_TL, cache_AGK, slots_T, positions=None, cos_sin=None):
    assert positions is None, "this layer does not rotate"
    _write(kv_latent_TL, k_rope_TR, cache_AGK, slots_T)
    return _keys(k_nope_TNP, k_rope_TR)


def _queries_and_write(
    q_latent_TNL, q_rope_TNR, kv_latent_TL, k_rope_TR, cache_AGK, slots_T, *, positions=None, cos_sin_cache=None
):
    assert positions is None, "this layer does not rotate"
    _write(kv_latent_TL, k_rope_TR, cache_AGK, slots_T)
    return torch.cat([q_latent_TNL, q_rope_TNR], -1)


def _gather(src_cache, dst, block_table, cu_seq_lens, token_to_seq, num_tokens, kv_cache_dtype, scale, seq_starts):
    request_S = token_to_seq[:num_tokens].long()
    position_S = torch.arange(num_tokens) - cu_seq_lens[request_S] + seq_starts[request_S]
    page_size = src_cache.shape[1]
    page_S = block_table[request_S, position_S // page_size].long()
    dst[:num_tokens] = src_cache[page_S, position_S % page_size]


def _initial_states(state, indices, has_initial_state) -> torch.Tensor:
    states = state[indices.long()].clone()
    states[~has_initial_state] = 0
    return states


def _gates(raw_g, raw_beta, A_log, bias):
    """Logarithm of the decay, and the strength of writing."""
    g = raw_g.float() + bias.view(1, 1, *raw_g.shape[2:])
    return -A_log.float().exp().view(1, 1, -1, 1) * torch.nn.functional.softplus(g), raw_beta.float().sigmoid()


def _theirs():
    from transformers.models.kimi_linear import modeling_kimi_linear

    return modeling_kimi_linear


def _linear_prefill(*, q, k, v, raw_g, raw_beta, A_log, g_bias, initial_state, cu_seqlens, lower_bound, **_):
    assert lower_bound is None, "that is another gate"
    g, beta = _gates(raw_g, raw_beta, A_log, g_bias)
    out, last = torch.empty_like(v), torch.empty_like(initial_state)
    for request, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        mine = slice(begin, end)
        out[:, mine], last[request] = _theirs().chunk_kimi_delta_attention(
            *(x[:, mine] for x in (q, k, v, g, beta)),
            initial_state=initial_state[request : request + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    return out, last


def _linear_decode(*, mixed_qkv, raw_g, raw_beta, A_log, dt_bias, initial_state, state_indices, lower_bound):
    """One token of each request."""
    assert lower_bound is None, "that is another gate"
    g, beta = _gates(raw_g, raw_beta, A_log, dt_bias)
    requests, heads, width = raw_g.shape[1:]
    q, k, v = (x.view(requests, 1, heads, width) for x in mixed_qkv.chunk(3, -1))
    slots = state_indices.long()
    out, states = _theirs().recurrent_kimi_delta_attention(
        q,
        k,
        v,
        g.view(requests, 1, heads, width),
        beta.view(requests, 1, heads),
        initial_state=initial_state[slots],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    initial_state[slots] = states.to(initial_state.dtype)
    return out.view(1, requests, heads, width), None
