"""Which of SGLang's ways through an MLA layer a batch takes: over expanded heads, or absorbed, in latent space."""

from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS as TAKES_ROPE_APART

from mla_backend.sglang_adapter import NAME, compat
from mla_backend.sglang_adapter.problem import text_config
from mla_backend.steps import expanding_is_cheaper
from mla_kernels import MLAGeometry

_EXPANDS = "mla_backend_expands"  # what a batch keeps of our choice


def take_over(model_config, *, absorb_all: bool = False) -> None:
    """Let SGLang's models ask us, and hand us nope and rope parts of queries and keys without concatenating them.

    absorb_all: leave every batch in latent space, as deterministic inference needs: over expanded heads bits differ.

    A model that scales its queries by position gets the concatenation: SGLang applies that factor to it alone. So does
    its draft model, whatever that does: SGLang asks by our name, and one process has both.
    """
    joined = joins_queries(model_config)
    method = _latent if absorb_all else _cheaper
    handlers.AttentionBackendRegistry.register(NAME, _absorbed if joined else method)
    if joined and NAME in TAKES_ROPE_APART:
        TAKES_ROPE_APART.remove(NAME)
    elif not joined and NAME not in TAKES_ROPE_APART:
        TAKES_ROPE_APART.append(NAME)


def joins_queries(model_config) -> bool:
    """Whether latent and rotary parts of queries come joined."""
    scaled_before = handlers.AttentionBackendRegistry.get_handler(NAME) is _absorbed
    return scaled_before or _scales_queries(model_config)


def _scales_queries(model_config) -> bool:
    return getattr(text_config(model_config), "llama_4_scaling", None) is not None


def _absorbed(attention, forward_batch) -> AttnForwardMethod:
    return handlers._dispatch_mla_subtype(attention, forward_batch)


def _latent(attention, forward_batch) -> AttnForwardMethod:
    """As `_absorbed`, which stands for models that scale their queries."""
    return _absorbed(attention, forward_batch)


def _cheaper(attention, forward_batch) -> AttnForwardMethod:
    """Expanded for a plain extend that multiplies less that way. Our backend attends to cached context by itself, so
    SGLang's plain method serves requests with a cached prefix too."""
    if forward_batch.forward_mode.is_extend_without_speculative() and not compat.is_captured_prefill(handlers):
        known = vars(forward_batch)
        if _EXPANDS not in known:  # all layers ask, and it is the same for all
            known[_EXPANDS] = _expands(attention, forward_batch)
        if known[_EXPANDS]:
            return AttnForwardMethod.MHA
    return _absorbed(attention, forward_batch)


def _expands(attention, forward_batch) -> bool:
    geometry = MLAGeometry(
        num_heads=attention.num_local_heads,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
    )
    return expanding_is_cheaper(geometry, forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu)
