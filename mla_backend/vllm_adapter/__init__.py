"""Registration with vLLM. Cheap, safe to repeat, touches no GPU."""

from importlib.metadata import entry_points, version

from mla_backend.config import MLABackendConfig
from mla_backend.models import UNLISTED
from mla_backend.vllm_adapter import compat

NAME = "CUSTOM"  # vLLM's slot for backends from outside, and what the user's flag says
PREFERRED_PAGE = 64  # tokens; a decode tile then lies in one page

BACKEND = "mla_backend.vllm_adapter.backend.MLABackend"
PREFILL_BACKEND = "mla_backend.vllm_adapter.prefill.MLAPrefill"
CPU_PLATFORM = "mla_backend.vllm_adapter.cpu_platform.MLACpuPlatform"


def register() -> None:
    """Put our classes into vLLM's `CUSTOM` slots for attention and for MLA prefill, and teach it models."""
    config = MLABackendConfig.from_environment()
    if config.disabled:
        return
    from vllm.logger import init_logger
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from mla_backend.vllm_adapter.model_types import teach

    logger = init_logger("vllm.mla_backend")
    for message in compat.warnings():
        logger.warning_once(message)
    for slot, add, path in (
        (AttentionBackendEnum.CUSTOM, register_backend, BACKEND),
        (MLAPrefillBackendEnum.CUSTOM, register_mla_prefill_backend, PREFILL_BACKEND),
    ):
        if slot.is_overridden() and slot.get_path() != path:
            logger.warning_once(
                "mla_backend takes %s from %s. Set MLA_BACKEND_DISABLE=1 to leave it there.", slot, slot.get_path()
            )
        add(slot, path)
    try:
        teach((*UNLISTED, *config.model_types))
    except Exception:  # whatever vLLM has changed there, CUSTOM is registered
        logger.exception("mla_backend could not add to vLLM's list of MLA model types; all else works")
    logger.debug("mla_backend %s registered as CUSTOM", version("mla-backend"))


def cpu_platform() -> str | None:
    """Our subclass of vLLM's CPU platform if vLLM would take exactly that platform, else None.

    vLLM's own class ignores `--attention-backend CUSTOM`, and a platform plugin is its official extension point. Two
    active platform plugins are an error in vLLM, so ours stands back for any other one.
    """
    if MLABackendConfig.from_environment().disabled:
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform" or _other_platform_is_active():
        return None
    return CPU_PLATFORM


def _other_platform_is_active() -> bool:
    from vllm import envs

    for plugin in entry_points(group="vllm.platform_plugins"):
        allowed = envs.VLLM_PLUGINS is None or plugin.name in envs.VLLM_PLUGINS
        if not allowed or plugin.value.startswith("mla_backend:"):
            continue
        try:
            if plugin.load()() is not None:
                return True
        except Exception:  # vLLM passes over a plugin that raises, whatever it raises; so do we
            continue
    return False
