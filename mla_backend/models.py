"""From a Hugging Face config to an MLA geometry. The only place that knows model names."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

from mla_kernels import MLAGeometry

_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models with one model_type.

    name: as people call them.
    missing: what they need and we do not have; empty for dense MLA.
    expanded: vLLM's own code for them caches expanded heads, so MLA needs another option.
    unlisted: vLLM's code for them has MLA layers, but its list of MLA model types (is_deepseek_mla) leaves them out.
    own_layers: module of vLLM with MLA layers of their own for CUDA, which want prefill in fp8 beside an fp8 cache.
    """

    name: str
    missing: str = ""
    expanded: bool = False
    unlisted: bool = False
    own_layers: str = ""


_SPARSE = "sparse MLA attention, which reads a few tokens that an indexer chose"
_LONGCAT = "longcat_flash"
_FAMILIES = {
    "deepseek_v2": Family(name="DeepSeek-V2"),
    "deepseek_v3": Family(name="DeepSeek-V3 (R1, Kimi-K2, Moonlight, Mistral Large 3)"),
    "kimi_k2": Family(name="Kimi-K2"),
    "kimi_linear": Family(name="Kimi-Linear", own_layers="vllm.models.kimi_k3"),
    "glm4_moe_lite": Family(name="GLM-4.7-Flash"),
    _LONGCAT: Family(name="LongCat-Flash"),
    "pangu_ultra_moe": Family(name="openPangu-Ultra"),
    "bailing_hybrid": Family(name="Bailing / Ling 2.5"),
    "axk1": Family(name="AXK1"),
    "sarvam_mla": Family(name="Sarvam-105B", unlisted=True),
    "youtu": Family(name="Youtu-LLM"),
    "minicpm3": Family(name="MiniCPM3", expanded=True),
    "deepseek_v32": Family(name="DeepSeek-V3.2", missing=_SPARSE),
    "deepseek_v4": Family(name="DeepSeek-V4", missing=_SPARSE),
    "deepseek_v41": Family(name="DeepSeek-V4.1", missing=_SPARSE),
    "glm_moe_dsa": Family(name="GLM-5", missing=_SPARSE),
    "glm5_next": Family(name="GLM-5-next", missing=_SPARSE),
    "hy_v4": Family(name="HY-V4", missing=_SPARSE),
    "axk2": Family(name="AXK2", missing=_SPARSE),
    "dots3_note": Family(name="dots3-note", missing=f"{_SPARSE}, and MLA with a sliding window"),
}
UNLISTED = tuple(model_type for model_type, family in _FAMILIES.items() if family.unlisted)
EXPANDED = tuple(model_type for model_type, family in _FAMILIES.items() if family.expanded)


def text_config(config: Mapping):
    """The part of a config.json that describes the language model, with attributes as transformers' configs have."""
    for part in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(part), Mapping):
            return SimpleNamespace(**config[part])
    return SimpleNamespace(**config)


def family_of(hf_config) -> Family:
    """The family of a text config. One that is not known is named by its model_type, and is sparse if it has an
    indexer."""
    model_type = getattr(hf_config, "model_type", None)
    family = _FAMILIES.get(model_type) or Family(name=model_type or "this model")
    if getattr(hf_config, "index_topk", None) and not family.missing:
        return replace(family, missing=_SPARSE)
    return family


def is_mla(hf_config) -> bool:
    """Whether keys and values come from a latent, however an engine may cache them."""
    return getattr(hf_config, "kv_lora_rank", None) is not None


def mla_layers(hf_config) -> int:
    """How many layers cache a latent row for every token. Raises ValueError where the config does not say."""
    linear = getattr(hf_config, "linear_attn_config", None)  # Kimi-Linear: the others have a state of fixed size
    if linear:
        if not isinstance(linear, Mapping) or not linear.get("full_attn_layers"):
            raise ValueError("its config's linear_attn_config names no full_attn_layers")
        return len(linear["full_attn_layers"])
    layers = getattr(hf_config, "num_hidden_layers", None)
    if getattr(hf_config, "num_layers", None) and (not layers or getattr(hf_config, "model_type", "") == _LONGCAT):
        return 2 * hf_config.num_layers  # LongCat: two attentions a layer
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"its config must have num_hidden_layers of 1 or more, got {layers}")
    return max(1, layers // (getattr(hf_config, "layer_group_size", None) or 1))  # Bailing 2.5: the last of each group


def layers_or_none(hf_config) -> int | None:
    """`mla_layers`, or None where the config does not say."""
    try:
        return mla_layers(hf_config)
    except ValueError:
        return None


def weight_bytes(folder: pathlib.Path) -> int:
    """Bytes of the weights in a checkpoint's folder; 0 where none are."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def geometry_of(hf_config, *, tensor_parallel_size: int = 1) -> MLAGeometry:
    """Geometry of one tensor-parallel rank of a model.

    hf_config: the text config of a dense MLA model (DeepSeek-V2 names of the fields).
    Raises ValueError that names every missing field, or heads that do not divide.
    """
    missing = [name for name in ("num_attention_heads", *_FIELDS) if getattr(hf_config, name, None) is None]
    if missing:
        model_type = getattr(hf_config, "model_type", "unknown")
        raise ValueError(f"not an MLA model (model_type {model_type}): its config has no {', '.join(missing)}")
    heads = hf_config.num_attention_heads
    if heads % tensor_parallel_size:
        raise ValueError(f"{heads} heads cannot be split over {tensor_parallel_size} tensor-parallel ranks")
    return MLAGeometry(num_heads=heads // tensor_parallel_size, **{name: getattr(hf_config, name) for name in _FIELDS})
