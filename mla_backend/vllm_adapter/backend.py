"""What vLLM asks before it takes us: names, limits, and reasons for a refusal."""

from dataclasses import replace
from typing import ClassVar

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf

from mla_backend.attention import LAYER_OPERATIONS
from mla_backend.config import MLABackendConfig
from mla_backend.models import family_of, geometry_of
from mla_backend.steps import tile_tokens
from mla_backend.vllm_adapter import NAME, PREFERRED_PAGE, compat
from mla_backend.vllm_adapter.compat import TILE_SCALED, TILE_SCALED_ROW, AskedForShapes
from mla_backend.vllm_adapter.model_types import not_served_as_mla
from mla_kernels import (
    FORMATS,
    CacheLayout,
    MLAGeometry,
    Problem,
    UnsupportedMLA,
    device_of,
    format_of,
    select,
    split_for,
)

CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", TILE_SCALED)  # of --kv-cache-dtype
OTHER_FP8 = {"fp8_e5m2": "values of another format, with a bit less"}
PAGE_MULTIPLE = 16  # what vLLM's schedulers and connectors are used to; the kernels take any size


def cache_dtype_of(kv_cache_dtype: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """Torch dtype that vLLM's `--kv-cache-dtype` stands for. Raises ValueError for one that we do not have."""
    if kv_cache_dtype not in (None, *CACHE_DTYPES):
        what = f" ({OTHER_FP8[kv_cache_dtype]})" if kv_cache_dtype in OTHER_FP8 else ""
        raise ValueError(
            f"mla_backend takes --kv-cache-dtype {', '.join(CACHE_DTYPES)}, got {kv_cache_dtype}{what}; "
            "name one of them, or leave the option out"
        )
    own = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    own |= dict.fromkeys(("fp8", "fp8_e4m3"), current_platform.fp8_dtype())
    own[TILE_SCALED] = FORMATS[TILE_SCALED].dtype
    return own.get(kv_cache_dtype, model_dtype)


def layer_geometry(layer) -> MLAGeometry:
    """Geometry of one layer on one rank, from the attributes that vLLM gives its impl and its prefill backend."""
    return MLAGeometry(
        num_heads=layer.num_heads,
        kv_lora_rank=layer.kv_lora_rank,
        qk_nope_head_dim=layer.qk_nope_head_dim,
        qk_rope_head_dim=layer.qk_rope_head_dim,
        v_head_dim=layer.v_head_dim,
    )


def make_problem(vllm_config, *, dtype, kv_cache_dtype, page_size: int | None = None, geometry=None) -> Problem:
    """The static facts of this server. Raises ValueError when it serves no MLA model that we know."""
    parallel = vllm_config.parallel_config
    geometry = geometry or geometry_of(
        vllm_config.model_config.hf_text_config, tensor_parallel_size=parallel.tensor_parallel_size
    )
    widths = geometry.kv_lora_rank, geometry.qk_rope_head_dim
    if kv_cache_dtype == TILE_SCALED and widths != (TILE_SCALED_ROW.latent, TILE_SCALED_ROW.rope):
        raise ValueError(
            f"vLLM makes room for {TILE_SCALED} rows of latent {TILE_SCALED_ROW.latent} + rope {TILE_SCALED_ROW.rope} "
            f"only, got {widths[0]} + {widths[1]}; take --kv-cache-dtype fp8, or leave the option out"
        )
    layout = CacheLayout(
        geometry=geometry,
        format=format_of(cache_dtype_of(kv_cache_dtype, dtype)),
        page_size=page_size or vllm_config.cache_config.block_size or PREFERRED_PAGE,
    )
    most = max_decode_query_len(vllm_config.speculative_config)
    most_tiled = max(most, tile_tokens(geometry.num_heads))  # prefill in latent space comes in tiles
    if envs.VLLM_BATCH_INVARIANT:
        return Problem(
            layout=layout,
            dtype=dtype,
            max_query_len=most_tiled,
            split_tokens=split_for(geometry),
            max_seq_len=vllm_config.model_config.max_model_len,
        )
    has_tiles = has_prefill(vllm_config.attention_config)
    return Problem(layout=layout, dtype=dtype, max_query_len=most_tiled if has_tiles else most)


def is_captured(vllm_config) -> bool:
    """Whether a CUDA graph can capture the kernel that decode takes. Of a server that `refusals` let pass."""
    dtype, cache_dtype = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
    problem = make_problem(vllm_config, dtype=dtype, kv_cache_dtype=cache_dtype)
    wanted = decode_problem(problem, vllm_config.parallel_config.decode_context_parallel_size)
    named = MLABackendConfig.from_environment().kernel_for("decode")
    return select("decode", wanted, device_of(vllm_config.device_config.device_type), kernel=named).kernel.capturable


def decode_problem(problem: Problem, ranks: int) -> Problem:
    """What decode gets where `ranks` share the cache: the heads of all of them, and every query token as a request."""
    if ranks == 1:
        return problem
    geometry = replace(problem.geometry, num_heads=ranks * problem.geometry.num_heads)
    return replace(problem, layout=replace(problem.layout, geometry=geometry), max_query_len=1)


def has_prefill(attention_config) -> bool:
    """Whether prefill under our decode is ours, too: unless the user named another."""
    return attention_config.mla_prefill_backend is None or attention_config.mla_prefill_backend.name == NAME


def max_decode_query_len(speculative) -> int:
    """Most query tokens that vLLM sends to decode for one request: 1, the drafted ones, and with parallel drafting as
    many again (`_init_reorder_batch_threshold` in vLLM's v1/attention/backend.py)."""
    if speculative is None:
        return 1
    return 1 + (speculative.num_speculative_tokens or 0) * (2 if speculative.parallel_drafting else 1)


def refusals(vllm_config, *, dtype, kv_cache_dtype, page_size, use_mla: bool) -> list[str]:
    """Every reason why this server cannot use us; empty when it can."""
    hf_config = vllm_config.model_config.hf_text_config
    if not use_mla:
        return [
            not_served_as_mla(vllm_config.model_config)
            or "mla_backend serves MLA layers only, and this model has none or has others beside them; leave out "
            "--attention-backend CUSTOM, or name it for MLA layers alone: -ac.backend_per_kind.mla_attention CUSTOM"
        ]
    reasons = []
    family = family_of(hf_config)
    if family.missing:
        reasons.append(f"{family.name} needs {family.missing}, and mla_backend has none yet; leave out CUSTOM")
    ranks = vllm_config.parallel_config.decode_context_parallel_size
    if envs.VLLM_BATCH_INVARIANT and ranks > 1:
        reasons.append(
            f"with VLLM_BATCH_INVARIANT=1 mla_backend needs --decode-context-parallel-size 1, got {ranks}: in which "
            "order the ranks' answers are added up is up to NCCL"
        )
    config, device = MLABackendConfig.from_environment(), device_of(vllm_config.device_config.device_type)
    if device.kind == "cpu" and ranks > 1 and not compat.cpu_shares_contexts():
        reasons.append(
            f"on a CPU --decode-context-parallel-size needs vLLM 0.32 or newer, got size {ranks}; leave it out"
        )
    if vllm_config.parallel_config.use_ubatching:
        reasons.append("mla_backend has not been run with overlapping micro-batches; leave out --enable-dbo")
    if getattr(vllm_config.attention_config, "use_prefill_query_quantization", False):
        reasons.append("mla_backend multiplies in the model's dtype; leave out -ac.use_prefill_query_quantization")
    other_prefill = vllm_config.attention_config.mla_prefill_backend
    if envs.VLLM_BATCH_INVARIANT and other_prefill is not None and other_prefill.name != NAME:
        reasons.append(
            "with VLLM_BATCH_INVARIANT=1 mla_backend sends prefill through its decode, whose bits another prefill has "
            f"not; leave out -ac.mla_prefill_backend {other_prefill.name}"
        )
    if kv_cache_dtype == TILE_SCALED and dtype != torch.bfloat16 and other_prefill and other_prefill.name != NAME:
        reasons.append(
            f"prefill of vLLM's own reads {TILE_SCALED} in bfloat16 only, got {dtype}; leave out "
            f"-ac.mla_prefill_backend {other_prefill.name}, or take --dtype bfloat16"
        )
    if page_size is not None and page_size % PAGE_MULTIPLE:
        reasons.append(f"mla_backend needs a --block-size that is a multiple of {PAGE_MULTIPLE}, got {page_size}")
    try:
        problem = make_problem(vllm_config, dtype=dtype, kv_cache_dtype=kv_cache_dtype, page_size=page_size)
    except ValueError as error:
        return [*reasons, str(error)]
    if problem.layout.format.scaled and compat.has_own_layers(family):
        reasons.append(
            f"vLLM's layers of {family.name} want prefill in fp8 beside an fp8 cache, and mla_backend multiplies in "
            f"the model's dtype; leave out --kv-cache-dtype {kv_cache_dtype}"
        )
    for operation in LAYER_OPERATIONS:
        try:
            wanted = decode_problem(problem, ranks) if operation == "decode" else problem
            select(operation, wanted, device, kernel=config.kernel_for(operation))
        except (UnsupportedMLA, ValueError) as error:
            reasons.append(str(error))
    return reasons


class MLABackend(AskedForShapes, MLACommonBackend):
    """The attention backend that `--attention-backend CUSTOM` selects."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # vLLM checks this list first; `refusals` says more about what is not on it.
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls():
        from mla_backend.vllm_adapter.impl import MLAImpl

        return MLAImpl

    @staticmethod
    def get_builder_cls():
        from mla_backend.vllm_adapter.metadata import MLAMetadataBuilder

        return MLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any: the kernels say what they cannot do

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, PREFERRED_PAGE)

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return True  # asked of the kernels, which give reasons

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # a step is planned from the host's query lengths

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, *_, **__
    ) -> str | None:
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None:  # somebody lists backends outside of an engine: there is no model to check
            return None
        reasons = refusals(
            vllm_config, dtype=dtype, kv_cache_dtype=kv_cache_dtype, page_size=block_size, use_mla=use_mla
        )
        return "; ".join(reasons) or None
