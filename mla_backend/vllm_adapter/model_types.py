"""MLA models that vLLM does not take for MLA, or serves expanded: what to teach it, and what to tell the user."""

from importlib import import_module

import torch

from mla_backend.models import EXPANDED, family_of, geometry_of, is_mla
from mla_kernels import CacheLayout, expanded_bytes_per_token, format_of

# vLLM asks these classes about a model's config, by model_type. Ours are made on top of whatever class is there.


class _Listed:
    """Says that a model with a latent is MLA."""

    def is_deepseek_mla(self) -> bool:
        return super().is_deepseek_mla() or is_mla(self.hf_text_config)


class _Announced:
    """Tells the user what vLLM's own code for a model makes of its latent."""

    def convert(self, *args, **kwargs):
        from vllm.logger import init_logger

        if is_mla(self.hf_text_config):
            name = family_of(self.hf_text_config).name
            init_logger("vllm.mla_backend").warning_once(
                "mla_backend: %s has a latent cache, but vLLM's own code for it caches expanded heads, %s. "
                "Unless you gave it already, --model-impl transformers (vLLM 0.28 or newer) serves it as MLA.",
                name,
                times_larger(self.hf_text_config),
            )
        return super().convert(*args, **kwargs)


def times_larger(hf_config) -> str:
    """How much larger a cache of expanded heads is than one of latents, in words."""
    try:
        geometry = geometry_of(hf_config)
    except ValueError:
        return "several times as large"
    latent = CacheLayout(geometry=geometry, format=format_of(torch.bfloat16), page_size=1)
    return f"{expanded_bytes_per_token(geometry, torch.bfloat16) / latent.row_bytes:.0f} times as large"


def teach(model_types) -> None:
    """Let vLLM take these model types for MLA if they have a latent, and announce those that it expands."""
    # vllm.config and the module below import each other, and only in this order does neither find the other half made.
    import_module("vllm.config")
    from vllm.transformers_utils import model_arch_config_convertor as arch

    # Types of EXPANDED have no MLA layers in vLLM's own code, so that taking them for MLA would break them.
    listed = [model_type for model_type in model_types if model_type not in EXPANDED]
    for ours, types in ((_Listed, listed), (_Announced, EXPANDED)):
        for model_type in types:
            theirs = arch.MODEL_ARCH_CONFIG_CONVERTORS.get(model_type, arch.ModelArchConfigConvertorBase)
            if not issubclass(theirs, ours):
                chained = type(f"{ours.__name__[1:]}{theirs.__name__}", (ours, theirs), {})
                arch.MODEL_ARCH_CONFIG_CONVERTORS[model_type] = chained


def not_served_as_mla(model_config) -> str | None:
    """Why vLLM gives this model, which has a latent, no MLA layers, and what to change; None if it has no latent."""
    from vllm import envs

    hf_config = model_config.hf_text_config
    if not is_mla(hf_config):
        return None
    model_type = getattr(model_config.hf_config, "model_type", "unknown")  # vLLM's list has that of the whole model
    if not getattr(hf_config, "is_causal", True):
        change = "vLLM has MLA for causal attention only: leave out CUSTOM"
    elif envs.VLLM_MLA_DISABLE:
        change = "unset VLLM_MLA_DISABLE"
    elif model_type in EXPANDED:
        change = "add --model-impl transformers (vLLM 0.28 or newer)"
    else:
        change = f"set MLA_BACKEND_MODEL_TYPES={model_type} if vLLM's code for it has MLA layers"
    return (
        f"mla_backend serves MLA layers, and vLLM would give {family_of(hf_config).name} (model_type {model_type}) "
        f"none although it has a latent of {hf_config.kv_lora_rank}: its cache would be {times_larger(hf_config)}; "
        f"{change}"
    )
