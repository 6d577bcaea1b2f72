"""One MLA layer in vLLM: translate the call, hand over to `MLAAttention`."""

import inspect
from functools import cache
from importlib.metadata import version
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from mla_backend.attention import LAYER_OPERATIONS, MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.scratch import Scratch, scratch_bytes
from mla_backend.steps import tile_tokens
from mla_backend.vllm_adapter import compat, memory
from mla_backend.vllm_adapter.backend import (
    decode_problem,
    has_prefill,
    layer_geometry,
    make_problem,
    max_decode_query_len,
)
from mla_backend.vllm_adapter.metadata import MLAMetadata
from mla_backend.warmup import Traffic, warm_up
from mla_kernels import Problem, device_of

logger = init_logger("vllm.mla_backend")


@cache
def _attention(
    problem: Problem, device, config: MLABackendConfig, scale: float, max_requests: int, ranks: int
) -> MLAAttention:
    """One object for all layers that ask the same of the same device: kernels are chosen and announced once."""
    attention = MLAAttention(problem, device, config, scale=scale, decode_problem=decode_problem(problem, ranks))
    logger.info("mla_backend %s: %s", version("mla-backend"), attention.describe(max_requests=max_requests))
    return attention


@cache
def _own_scratch(device: torch.device, shapes) -> Scratch:
    """One for all layers that need as much."""
    scratch = Scratch(device)
    scratch.reserve(shapes)
    return scratch


class MLAImpl(MLACommonImpl[MLAMetadata]):
    """Cache write, decode and prefill by our kernels."""

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True
    supports_mtp_with_cp_non_trivial_interleave_size: bool = True
    supports_pcp: bool = False
    _ready: ClassVar[set[tuple[MLAAttention, Traffic]]] = set()
    _slices: ClassVar[dict[tuple, tuple[int, list[torch.Tensor]]]] = {}  # of vLLM's memory for scratch: see _scratch

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _refuse_unknown_features(**inspect.signature(super().__init__).bind(*args, **kwargs).arguments)
        self.supports_quant_query_input = False  # our decode takes queries in the model's dtype
        self._vllm_config = vllm_config = get_current_vllm_config()
        problem = make_problem(
            vllm_config,
            dtype=torch.get_default_dtype(),
            kv_cache_dtype=self.kv_cache_dtype,
            geometry=layer_geometry(self),
        )
        device = device_of(vllm_config.device_config.device)
        if device.kind == "cpu" and _ranks(vllm_config) > 1:
            compat.share_contexts_on_cpu()
        self._max_requests, self._ranks = _most_decoded(vllm_config), _ranks(vllm_config)
        config = MLABackendConfig.from_environment()
        self.attention = _attention(problem, device, config, self.scale, self._max_requests, self._ranks)
        self._scratch_shapes = tuple(self.attention.decode_workspace(self._max_requests))
        self._scratch_bytes = scratch_bytes(self._scratch_shapes)
        self._device = torch.device(vllm_config.device_config.device)
        self._scratch()  # vLLM builds layers before it profiles memory, so this scratch is in its account
        self.own_prefill = _claim_prefill(vllm_config.attention_config)

    def _scratch(self) -> list[torch.Tensor]:
        """Decode scratch: a slice of the memory that vLLM shares among layers, and locks before it serves. Where it has
        none, on a CPU, of memory of our own."""
        if not self._scratch_shapes:
            return []
        if not is_workspace_manager_initialized():
            return _own_scratch(self._device, self._scratch_shapes).take(self._scratch_shapes)
        if not current_workspace_manager().is_locked():
            self._slices.clear()  # of all layers: they would keep what it grows out of
            return current_workspace_manager().get_simultaneous(*self._scratch_shapes)
        (whole,) = current_workspace_manager().get_simultaneous(((self._scratch_bytes,), torch.uint8))
        address, slices = self._slices.get(self._scratch_shapes, (0, None))
        if address != whole.data_ptr():
            slices = current_workspace_manager().get_simultaneous(*self._scratch_shapes)
            self._slices[self._scratch_shapes] = whole.data_ptr(), slices
        return slices

    def reserve_workspace(self) -> None:
        """vLLM (0.33) profiles memory, or runs a step without requests: take for a moment what a step takes beyond what
        vLLM counts itself. Outside of its profile vLLM may have no current config."""
        self._scratch()
        ours, counted = self._step_memory(self._vllm_config)
        torch.empty(max(ours - counted, 0), dtype=torch.uint8, device=self._device)

    def _step_memory(self, vllm_config, models_layer: bool = False) -> tuple[int, int]:
        """Bytes that a step of ours takes beside scratch, none if prefill is not ours, and those that vLLM counts."""
        problem = self.attention.problem
        ours = 0
        if self.own_prefill:
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            keys = max(tokens, memory.context_rows(vllm_config))
            ours = memory.step_bytes(vllm_config, problem) + self.attention.prefill_bytes(tokens=tokens, keys=keys)
        if models_layer:  # vLLM's profile leaves such a layer out
            return ours + memory.concatenated_bytes(vllm_config, problem), 0
        return ours, memory.profiled_bytes(vllm_config, problem)

    def get_ready(
        self, layer, vllm_config, page_size: int, most_query_tokens: int, *, models_layer: bool = False
    ) -> None:
        """Compile and load all that serving can ask for, and say what memory a step takes.

        layer: the one that this belongs to.
        most_query_tokens: that a request brings to decode, in one piece.
        models_layer: whether the layer is one of the model's own in place of vLLM's, which hands over queries as one
            tensor and calls prefill itself.
        """
        problem, shared = self.attention.problem, self._ranks > 1
        of_tile = tile_tokens(problem.geometry.num_heads)
        extends = self.own_prefill and not (shared or models_layer)  # a model's own layer calls vLLM's prefill
        self._layer, self.absorbs = layer, extends and hasattr(layer, "W_UK_T")
        if extends and not self.absorbs:
            logger.info_once("mla_backend: vLLM keeps absorbed weights for AITER alone; all prefill is expanded")
        traffic = Traffic(
            max_requests=self._max_requests,
            page_size=page_size,
            uniform=(1,) if shared else range(1, most_query_tokens + 1),
            ragged=() if shared else (most_query_tokens,),
            joined=shared or models_layer,
            tiled=(of_tile,) if problem.split_tokens or self.absorbs else (),
        )
        if (self.attention, traffic) in self._ready:  # vLLM makes builders for its profile of CUDA graphs, too
            return
        self._ready.add((self.attention, traffic))
        warmed = warm_up(
            self.attention,
            traffic,
            self._device,
            scratch=self._scratch(),
            scaled=problem.layout.format.scaled,
            operations=LAYER_OPERATIONS if self.own_prefill and not problem.split_tokens else ("decode", "cache_write"),
        )
        if warmed:
            logger.info("mla_backend: %s%s", warmed, self._say_memory(vllm_config, models_layer))

    def _say_memory(self, vllm_config, models_layer: bool = False) -> str:
        ours, counted = self._step_memory(vllm_config, models_layer)
        if not ours:
            return ""
        said = f"; a step takes up to {ours / 2**20:.1f} MiB beside scratch, and vLLM's profile of memory "
        if ours <= counted:
            return said + f"left it {counted / 2**20:.1f}"
        if compat.counts_our_steps() and not models_layer:
            return said + "counted them"
        return said + (
            f"left it {counted / 2**20:.1f} only: leave the rest free, with a smaller --gpu-memory-utilization, or "
            "lower --max-num-batched-tokens"
        )

    def do_kv_cache_update(
        self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale=False
    ) -> None:
        if kv_cache.numel() == 0:  # memory is being profiled: there is no cache yet
            return
        slots = slot_mapping.flatten()
        if slots.shape[0] != kv_c_normed.shape[0]:  # either may be padded for a graph
            tokens = min(len(slots), len(kv_c_normed))
            kv_c_normed, k_pe, slots = kv_c_normed[:tokens], k_pe[:tokens], slots[:tokens]
        scale = None if skip_scale else k_scale
        self.attention.write(kv_c_normed, k_pe.flatten(1), self._pages(kv_cache), slots, cache_scale=scale)

    def _pages(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache in its own dtype: vLLM hands over any fp8 cache as bytes where it is written."""
        return kv_cache.view(self.attention.problem.layout.format.dtype) if kv_cache.dtype == torch.uint8 else kv_cache

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata: MLAMetadata, layer):
        if not isinstance(q, tuple):
            q = q.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return self.attention.decode(
            *q,
            self._pages(kv_c_and_k_pe_cache),
            attn_metadata.decode.step,
            workspace=self._scratch(),
            cache_scale=layer._k_scale if self.attention.problem.layout.format.scaled else None,
        )

    def forward_mha(
        self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata: MLAMetadata, k_scale, output, output_scale=None
    ) -> None:
        if not self.own_prefill:
            super().forward_mha(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale)
            return
        cache_AGK = self._pages(kv_c_and_k_pe_cache)
        into = {"cache_scale": k_scale, "out_TNV": output.view(-1, self.num_heads, self.v_head_dim)}
        if attn_metadata.prefill_step is not None:
            new = kv_c_normed, k_pe.flatten(1)
            self.attention.prefill(q, *new, cache_AGK, attn_metadata.prefill_step, up_project=self._up_project, **into)
        if attn_metadata.latent_step is not None:
            # Of the layer: vLLM makes them from whatever format the projection is in, and anew if weights are loaded
            # again.
            weights = {"w_k_NPL": self._layer.W_UK_T, "w_v_NLV": self._layer.W_UV}
            self.attention.extend(q, cache_AGK, attn_metadata.latent_step, workspace=self._scratch(), **weights, **into)

    def _up_project(self, latent_SL: torch.Tensor) -> torch.Tensor:
        expanded = self.kv_b_proj(latent_SL)[0]
        return expanded.view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)


def _ranks(vllm_config) -> int:
    return vllm_config.parallel_config.decode_context_parallel_size


def _most_decoded(vllm_config) -> int:
    """Requests of a call of decode; where ranks share the cache every query token is one."""
    tokens = max_decode_query_len(vllm_config.speculative_config) if _ranks(vllm_config) > 1 else 1
    return vllm_config.scheduler_config.max_num_seqs * tokens


def _refuse_unknown_features(*, attn_type: str = "decoder", **arguments) -> None:
    """Raise NotImplementedError for what vLLM may ask of a layer and we would otherwise silently leave out."""
    asked = {name: arguments.get(name) for name in ("alibi_slopes", "sliding_window", "logits_soft_cap")}
    reasons = [f"no {name}, got {value}" for name, value in asked.items() if value]
    if attn_type != "decoder":
        reasons.append(f"attn_type decoder, got {attn_type}")
    if reasons:
        raise NotImplementedError(
            f"mla_backend cannot serve this layer; it needs {'; '.join(reasons)}. Leave out --attention-backend CUSTOM."
        )


def _claim_prefill(attention_config) -> bool:
    """Make our prefill the one that vLLM takes for this layer, unless the user named another. Returns whether it is
    ours.

    vLLM picks a prefill backend right after it has built this object, from the same config, and raises if none of its
    own takes the model's shape. On a CPU it ignores the config and builds its own, which `forward_mha` then leaves
    unused.
    """
    if attention_config.mla_prefill_backend is None:
        attention_config.mla_prefill_backend = MLAPrefillBackendEnum.CUSTOM
    return has_prefill(attention_config)
