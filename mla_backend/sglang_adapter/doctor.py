"""What `mla-backend doctor` asks SGLang: whether it has us, and what it would make of a model."""

import pathlib

import torch

from mla_backend.findings import Examination, Server, parser_errors
from mla_backend.models import family_of, layers_or_none, weight_bytes
from mla_backend.sglang_adapter import NAME, compat
from mla_kernels import Device

GROUPS = ("sglang.srt.plugins",)
INSTALL = "pip install sglang"
_BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def check_registration(result: Examination, device: Device) -> bool:
    """Load SGLang's plugins as SGLang does, and see whether its registry has us. False if it cannot be imported."""
    try:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

        load_plugins()
    except Exception as error:  # whatever a broken installation raises
        result.cannot_import("SGLang", error)
        return False
    for message in compat.warnings():
        result.warn(message)
    if NAME in ATTENTION_BACKENDS and NAME in ATTENTION_BACKEND_CHOICES:
        result.ok(f"SGLang's options take the name {NAME}")
    else:
        result.fault(f"SGLang does not know the name {NAME}", "if SGLANG_PLUGINS is set, name mla_backend in it")
    return True


def _arguments(model: str, options: list[str]):
    """Those of `sglang serve --model-path MODEL --attention-backend mla_backend` and `options`. Raises what SGLang
    raises."""
    from sglang.srt.server_args import prepare_server_args

    named = any(word.split("=")[0] == "--attention-backend" for word in options)
    chosen = [] if named else ["--attention-backend", NAME]
    with parser_errors():
        return prepare_server_args(["--model-path", model, "--skip-tokenizer-init", *chosen, *options])


def _check_choice(result: Examination, arguments) -> None:
    """Options may name other backends than ours, for all work or for a part."""
    both, prefill, decode = (getattr(arguments, name) for name in _BACKENDS)
    others = {"prefill": prefill or both, "decode": decode or both}
    if NAME not in others.values():
        result.fault(f"these options choose {both or prefill or decode}", "leave them out")
        return
    for work, backend in others.items():
        if backend != NAME:
            result.warn(f"{work} is done by {backend}, as these options say; below, ours is tested")


def _facts(arguments, model_config, device: Device):
    from sglang.srt.configs.model_config import AttentionArch

    from mla_backend.sglang_adapter.problem import Facts

    cache_dtype = arguments.kv_cache_dtype
    own = {"auto": model_config.dtype, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    own["fp8_e4m3"] = torch.float8_e4m3fn  # on a GPU of AMD that has another one, SGLang takes that; then we refuse
    replicas = arguments.dp_size if getattr(arguments, "enable_dp_attention", False) else 1
    ranks = arguments.tp_size // replicas
    if model_config.num_attention_heads % ranks:
        raise ValueError(
            f"--tp-size must divide the model's {model_config.num_attention_heads} heads, got {ranks} ranks"
        )
    return Facts(
        model_config=model_config,
        arguments=arguments,
        is_draft=False,
        is_mla=model_config.attention_arch == AttentionArch.MLA,
        dtype=model_config.dtype,
        kv_cache_dtype=own.get(cache_dtype, cache_dtype),
        page_size=1 if arguments.page_size is None else arguments.page_size,
        device=device,
        heads=model_config.num_attention_heads // ranks,
        draft_tokens=arguments.speculative_num_draft_tokens or 1,
    )


def server(result: Examination, model: str, options: list[str], device: Device) -> Server | None:
    """The server that these options would start; None if it would not be served by us."""
    from sglang.srt.configs.model_config import ModelConfig

    from mla_backend.sglang_adapter.problem import make_problem, text_config

    try:
        arguments = _arguments(model, options)
        model_config = ModelConfig.from_server_args(arguments)
    except Exception as error:  # whatever SGLang says to a model or an option
        result.does_not_take("SGLang", model, error)
        return None
    _check_choice(result, arguments)
    hf_config = text_config(model_config)
    result.facts["model"] = f"{family_of(hf_config).name} (model_type {getattr(hf_config, 'model_type', 'none')})"
    try:
        problem, _ = make_problem(_facts(arguments, model_config, device))
    except ValueError as error:
        result.fault(str(error))
        return None
    result.facts["problem"] = str(problem)
    return Server(
        problem=problem,
        layers=layers_or_none(hf_config),
        weight_bytes=weight_bytes(pathlib.Path(model)) // arguments.tp_size,
        memory_share=arguments.mem_fraction_static or 0,
    )
