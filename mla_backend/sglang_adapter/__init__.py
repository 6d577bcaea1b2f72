"""Registration with SGLang. Cheap, safe to repeat, touches no GPU."""

import logging

from mla_backend.config import MLABackendConfig

logger = logging.getLogger("sglang.mla_backend")
NAME = "mla_backend"  # what the user's --attention-backend, --prefill- and --decode-attention-backend say


def register() -> None:
    """Put our backend into SGLang's registry and its name among the choices of SGLang's options."""
    if MLABackendConfig.from_environment().disabled:
        return
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from mla_backend.sglang_adapter import compat

    for message in compat.warnings():
        logger.warning(message)
    register_attention_backend(NAME)(create)
    compat.add_choices()


def create(runner):
    """SGLang's factory: the backend of one model runner. Raises ValueError with every reason against it."""
    from mla_backend.sglang_adapter import draft, forward_method
    from mla_backend.sglang_adapter.backend import SGLangMLABackend

    backend = SGLangMLABackend(runner)
    forward_method.take_over(runner.model_config, absorb_all=backend.problem.split_tokens is not None)
    draft.take_over()
    return backend
