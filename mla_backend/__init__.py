"""Engine plugins for MLA attention: entry points only. Importing this imports no engine, no Triton and no kernel."""

import logging

_logger = logging.getLogger("vllm.mla_backend")  # vLLM shows only what is below the name "vllm"
_sglang_logger = logging.getLogger("sglang.mla_backend")


def register_vllm() -> None:
    """Entry point of `vllm.general_plugins`. vLLM would die of an exception here, so none leaves."""
    try:
        from mla_backend.vllm_adapter import register

        register()
    except Exception:  # whatever it is, vLLM has to start without us
        _logger.exception("mla_backend could not register with this vLLM; `CUSTOM` is not available, all else works")


def vllm_cpu_platform() -> str | None:
    """Entry point of `vllm.platform_plugins`: our subclass of vLLM's CPU platform, or None to stand back."""
    try:
        from mla_backend.vllm_adapter import cpu_platform

        return cpu_platform()
    except Exception:  # whatever it is, vLLM has to start without us
        _logger.exception("mla_backend could not look at vLLM's platforms; on a CPU `CUSTOM` will be ignored")
        return None


def register_sglang() -> None:
    """Entry point of `sglang.srt.plugins`. SGLang would log an exception and go on without our name; so do we, and
    say which name is missing."""
    try:
        from mla_backend.sglang_adapter import register

        register()
    except Exception:  # whatever it is, SGLang has to start without us
        _sglang_logger.exception("mla_backend could not register with this SGLang; its options do not know our name")
