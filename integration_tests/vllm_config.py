"""What our adapter reads of vLLM's config before there is an engine, of a server of a dense model."""

from types import SimpleNamespace


def vllm_config(*, heads: int, prefill: str | None = None, device: str = "cpu", **shape) -> SimpleNamespace:
    """prefill: as `-ac.mla_prefill_backend` names it.   shape: other widths than DeepSeek's."""
    widths = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128} | shape
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_attention_heads=heads, **widths)),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1, use_ubatching=False),
        attention_config=SimpleNamespace(mla_prefill_backend=prefill and SimpleNamespace(name=prefill)),
        cache_config=SimpleNamespace(block_size=64),
        speculative_config=None,
        device_config=SimpleNamespace(device_type=device),
    )
