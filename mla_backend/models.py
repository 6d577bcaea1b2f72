"""From a Hugging Face config to an MLA geometry. The only place that knows model names."""

from mla_kernels import MLAGeometry

_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# Models whose attention reads a few tokens that an indexer chose (DeepSeek sparse attention).
_SPARSE = {
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "deepseek_v41": "DeepSeek-V4.1",
    "glm_moe_dsa": "GLM-5",
    "glm5_next": "GLM-5-next",
    "hy_v4": "HY-V4",
}


def sparse_model(hf_config) -> str | None:
    """The name of the model if its attention is sparse MLA, else None."""
    model_type = getattr(hf_config, "model_type", "")
    if model_type in _SPARSE:
        return _SPARSE[model_type]
    return model_type or "this model" if getattr(hf_config, "index_topk", None) else None


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
