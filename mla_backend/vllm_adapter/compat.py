"""Every difference between the vLLM versions that we serve, and every workaround for one of them."""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from packaging.version import Version

from mla_backend.models import Family
from mla_backend.steps import ContextChunk
from mla_kernels import PackedRow

FIRST, LAST = "0.26", "0.33"

TILE_SCALED = "fp8_ds_mla"  # vLLM's name of that cache, and ours
TILE_SCALED_ROW = PackedRow(latent=512, rope=64)  # the only row that vLLM has room for: it counts 656 bytes a token


def warnings() -> Iterator[str]:
    """What the user of this vLLM should know, each once a process."""
    import vllm
    from vllm import envs

    release = Version(vllm.__version__).release
    if not Version(FIRST).release <= release[:2] <= Version(LAST).release:
        yield (
            f"mla_backend is made for vLLM {FIRST} to {LAST} and was not tested with {vllm.__version__}. "
            "It may fail to start; MLA_BACKEND_DISABLE=1 switches it off."
        )
    if getattr(envs, "VLLM_TARGET_DEVICE", None) == "cpu":
        yield (
            "VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins, so on this CPU `--attention-backend CUSTOM` "
            "will be ignored. Unset it: vLLM's CPU build finds its platform by itself."
        )


class AskedForShapes:
    """A backend that vLLM asks for the shape of its cache.

    Why: until 0.28 vLLM knows only how many bytes a page has; since then it makes the tensor by itself.
    Remove when: vLLM 0.28 is no longer served.
    """

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        return num_blocks, block_size, TILE_SCALED_ROW.bytes if cache_dtype_str == TILE_SCALED else head_size


def gather_buffer(workspace: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows for cached context in the dtype of the model.

    Why: for an fp8_ds_mla cache vLLM's own buffer has bfloat16, whatever the model has, since its kernel writes that.
    Remove when: that buffer has the model's dtype.
    """
    return workspace if workspace.dtype == dtype else torch.empty_like(workspace, dtype=dtype)


def context_chunk_of_call(prefill, chunk, chunk_idx: int | None) -> ContextChunk:
    """The chunk that `run_prefill_context_chunk` is called for.

    Why: until 0.27 it is named by `chunk_idx`, and `chunked_context` holds rectangular arrays, one row a chunk with an
    entry for every prefill request; since 0.28 a packed chunk is handed over as `chunk`, for a run of requests.
    Remove when: vLLM 0.27 is no longer served.
    """
    return _packed_chunk(chunk) if chunk_idx is None else _rectangular_chunk(prefill, chunk_idx)


def _packed_chunk(chunk) -> ContextChunk:
    return ContextChunk(
        requests=chunk.request_slice,
        tokens=chunk.token_slice,
        query_start_B1=chunk.query_start_loc,
        max_query_len=chunk.max_query_len,
        starts_B=chunk.starts,
        key_start_B1=chunk.cu_seq_lens,
        max_key_len=chunk.max_seq_len,
        num_keys=chunk.num_context_tokens,
    )


def _rectangular_chunk(prefill, i: int) -> ContextChunk:
    context = prefill.chunked_context
    return ContextChunk(
        requests=slice(None),
        tokens=slice(None),
        query_start_B1=prefill.query_start_loc,
        max_query_len=prefill.max_query_len,
        starts_B=context.starts[i],
        key_start_B1=context.cu_seq_lens[i],
        max_key_len=int(context.max_seq_lens[i]),
        num_keys=int(context.seq_tot[i]),
    )


def packs_context() -> bool:
    """Whether a chunk of cached context may be for one request alone.

    Why: until 0.27 each request of a batch gets an equal share of a chunk, in whole pages; since 0.28 chunks are
    packed.
    Remove when: vLLM 0.27 is no longer served.
    """
    from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata

    return hasattr(MLACommonPrefillMetadata, "ContextChunk")


def counts_our_steps() -> bool:
    """Whether vLLM asks us, in its profile of memory, for what a step takes.

    Why: `reserve_workspace` came with 0.33.
    """
    from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl

    return hasattr(MLACommonImpl, "reserve_workspace")


def has_own_layers(family: Family) -> bool:
    """Whether this vLLM serves the family by MLA layers of its own, which write the cache and call prefill themselves.

    Why: those of `Family.own_layers` (since 0.27) assert fp8 queries beside an fp8 cache, in the first prefill.
    Remove when: they ask the prefill backend.
    """
    from vllm.platforms import current_platform

    return bool(family.own_layers) and current_platform.is_cuda() and find_spec(family.own_layers) is not None


def refuse_adapters_of(kv_b_proj) -> None:
    """Let vLLM refuse an adapter (LoRA) that changes this projection of an MLA layer, with ValueError.

    Why: vLLM wraps the projection, but decode multiplies with matrices that were absorbed from the model's own weights,
    and prefill calls the projection beneath. The adapter would be left out, and nobody would say so.
    Remove when: vLLM refuses such an adapter.
    """
    if not hasattr(kv_b_proj, "set_lora") or "set_lora" in vars(kv_b_proj):
        return
    take = kv_b_proj.set_lora

    def refuse(index, lora_a, lora_b):
        if lora_a.any() and lora_b.any():  # with empty ones vLLM measures memory and captures graphs
            raise ValueError(
                "mla_backend cannot serve an adapter for kv_b_proj: vLLM has absorbed that projection of MLA layers "
                "into others. Make the adapter without kv_b_proj, or merge it into the model's weights."
            )
        take(index, lora_a, lora_b)

    kv_b_proj.set_lora = refuse


def disable_broken_cpu_rotary_op(compilation_config) -> None:
    """Use vLLM's own torch rotary embedding on a CPU.

    Why: the compiled CPU op of 0.32 takes wrong strides from [tokens, heads, width] queries and from sliced keys,
    which is what MLA hands it, so every token comes out wrong when custom ops are on (enforce_eager with plain rotary
    embedding).
    How: one more entry in `custom_ops`, unless the user named the op.
    Remove when: vLLM's CPU op agrees with `forward_native` on such inputs.
    """
    if not any(op.lstrip("+-") == "rotary_embedding" for op in compilation_config.custom_ops):
        compilation_config.custom_ops.append("-rotary_embedding")


def cpu_shares_contexts() -> bool:
    """Whether vLLM's CPU engine can run decode context parallelism with us.

    Why: what `share_contexts_on_cpu` replaces has other arguments before 0.32, and before 0.31 cannot be replaced.
    Remove when: vLLM 0.31 is no longer served.
    """
    import vllm

    return Version(vllm.__version__).release[:2] >= (0, 32)


@cache
def share_contexts_on_cpu() -> None:
    """Let vLLM's CPU engine run decode context parallelism.

    Why: its slot mapping for CPUs refuses it, and answers of ranks are merged by a Triton kernel; CPU builds have no
    Triton.
    How: what vLLM puts in place of Triton kernels itself. Not by its `register_kernels`, which looks at everything that
    is imported and by now trips over some of it.
    Remove when: vLLM's CPU build has both.
    """
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.attention.ops.dcp import CorrectAttnCPOutKernel
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    from mla_backend.vllm_adapter import cpu_kernels

    ComputeSlotMappingKernel.kernel = KernelOverride(ComputeSlotMappingKernel.kernel, cpu_kernels.slot_mapping)
    CorrectAttnCPOutKernel.kernel = KernelOverride(CorrectAttnCPOutKernel.kernel, cpu_kernels.weigh_answer)
    CorrectAttnCPOutKernel.kernel.constexprs = cpu_kernels.CONSTANTS_OF_WEIGH_ANSWER  # counted at a launch
