"""Every difference between the SGLang versions that we serve, and every workaround for one of them."""

import inspect
from collections.abc import Iterator

import torch
from packaging.version import Version

from mla_backend.sglang_adapter import NAME

FIRST, LAST = "0.5.13", "0.5.23"


def warnings() -> Iterator[str]:
    """What the user of this SGLang should know."""
    import sglang

    release = Version(sglang.__version__).release
    if not Version(FIRST).release <= release[:3] <= Version(LAST).release:
        yield (
            f"mla_backend is made for SGLang {FIRST} to {LAST} and was not tested with {sglang.__version__}. "
            "It may fail to start; MLA_BACKEND_DISABLE=1 switches it off."
        )


def add_choices() -> None:
    """Let SGLang's options for target and draft models take our name, and its deterministic mode too, with its radix
    cache.

    Why: SGLang's own functions for this append, and a name that is added twice is listed twice; the list for draft
    models came with 0.5.19.
    """
    from sglang.srt import server_args

    for choices in (
        "ATTENTION_BACKEND_CHOICES",
        "DRAFT_ATTENTION_BACKEND_CHOICES",
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
    ):
        known = getattr(server_args, choices, None)
        if known is not None and NAME not in known:
            known.append(NAME)


def attention_ranks() -> int:
    """Ranks that share the attention heads of one model replica.

    Why: `runtime_context` came with 0.5.14.
    """
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:
        from sglang.srt.layers.dp_attention import get_attention_tp_size

        return get_attention_tp_size()
    return get_parallel().attn_tp_size


def draft_tokens(runner) -> int:
    """Tokens of a request that are verified at once; 1 without speculative decoding.

    Why: until 0.5.16 they stand in the server's arguments, which later versions resolve into `runtime_context`.
    """
    try:
        from sglang.srt.runtime_context import get_spec
    except ImportError:
        return runner.server_args.speculative_num_draft_tokens or 1
    return get_spec().speculative_num_draft_tokens or 1


def is_captured_prefill(handlers) -> bool:
    """Whether a prefill runs between the pieces of a CUDA graph, whose shapes must not depend on cached context.

    handlers: SGLang's module of attention handlers, which asks the same.
    Why: there is one such graph until 0.5.14 and two since, and the first was renamed.
    """
    names = ("is_in_piecewise_cuda_graph", "is_in_tc_piecewise_cuda_graph", "is_in_breakable_cuda_graph")
    return any(getattr(handlers, name)() for name in names if hasattr(handlers, name))


def write_slots(forward_batch) -> torch.Tensor:
    """Token slots of the cache that a step writes to. Raises NotImplementedError where they are no slots of the pool.

    Why: since 0.5.22 a batch may carry numbers that only SGLang's unified pool can place; it says so.
    """
    if getattr(forward_batch, "kv_loc_plan", None) is not None and not getattr(
        forward_batch, "out_cache_loc_is_physical", True
    ):
        raise NotImplementedError(
            "mla_backend writes to slots of SGLang's MLA pool, and this batch has none: leave the unified pool off"
        )
    return forward_batch.out_cache_loc


def is_list_of_draft_steps(error_template: str) -> bool:
    """Which of SGLang's two lists of draft backends a message belongs to: those of single steps, or of extends.

    Why: both go through one method, which is told which option named the backend, and either list may come from
    either option; only their messages differ.
    """
    return "decode attention backend" in error_template


def draft_backend(create, backend):
    """What an entry of SGLang's lists of draft backends returns.

    create: the method of SGLang's factory that calls it.
    Why: since 0.5.18 the name comes with the backend, and that method gained an option at the same time.
    """
    return (NAME, backend) if "stamps_children" in inspect.signature(create).parameters else backend
