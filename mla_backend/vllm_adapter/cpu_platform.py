"""vLLM's CPU platform, except that it honours `--attention-backend CUSTOM` for MLA models."""

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from mla_backend.vllm_adapter import NAME, PREFERRED_PAGE, compat

logger = init_logger("vllm.mla_backend")


def _is_ours(backend) -> bool:
    return backend is not None and backend.name == NAME


class MLACpuPlatform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        if not _is_ours(selected_backend):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Selected backend CUSTOM is not valid for this configuration. Reason: {reasons}")
        return selected_backend.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        """Keep what the limits of vLLM's own CPU MLA kernels would take away.

        On a CPU without AMX the parent sets pages of 16 tokens and switches chunked prefill and prefix caching off for
        every MLA model, whatever backend serves it.
        """
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        page = cache.block_size if cache.user_specified_block_size else PREFERRED_PAGE
        kept = page, cache.enable_prefix_caching, scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        super().check_and_update_config(vllm_config)
        model, attention = vllm_config.model_config, vllm_config.attention_config
        per_kind = getattr(attention, "backend_per_kind", None) or {}
        ours = _is_ours(attention.backend) or any(_is_ours(backend) for backend in per_kind.values())
        if model is None or not model.use_mla or not ours:
            return
        cache.block_size, cache.enable_prefix_caching, scheduler.enable_chunked_prefill, tokens = kept
        scheduler.max_num_batched_tokens = tokens
        logger.info_once(
            "mla_backend serves this model: chunked prefill and prefix caching stay as you set them, and prefill "
            "is done by mla_backend, whatever vLLM's own lines about MLA on a CPU say."
        )
        compat.disable_broken_cpu_rotary_op(vllm_config.compilation_config)
