"""Our prefill as a vLLM prefill backend: for `-ac.mla_prefill_backend CUSTOM`, and for layers that call one
directly."""

from functools import cache
from typing import ClassVar

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.models import geometry_of
from mla_backend.vllm_adapter import NAME, compat
from mla_backend.vllm_adapter.backend import layer_geometry
from mla_backend.warmup import Traffic, warm_up
from mla_kernels import CacheLayout, MLAGeometry, Problem, UnsupportedMLA, device_of, format_of, select


def _problem(geometry: MLAGeometry, dtype: torch.dtype) -> Problem:
    """Prefill works on expanded heads: the cache format that it is told does not matter to it."""
    return Problem(layout=CacheLayout(geometry=geometry, format=format_of(dtype), page_size=1), dtype=dtype)


def _is_under_our_decode(attention_config) -> bool:
    per_kind = getattr(attention_config, "backend_per_kind", None) or {}
    named = (attention_config.backend, *per_kind.values())
    return any(getattr(backend, "name", backend) == NAME for backend in named)


@cache
def _attention(problem: Problem, where: torch.device, scale: float) -> MLAAttention:
    """One object for all layers, with its kernels compiled. vLLM makes layers, and these, before it is ready."""
    config = MLABackendConfig.from_environment()
    attention = MLAAttention(problem, device_of(where), config, scale=scale, operations=("prefill",))
    warm_up(attention, Traffic(max_requests=1, page_size=1, accumulates=False), where, operations=("prefill",))
    return attention


class MLAPrefill(MLAPrefillBackend):
    """Causal attention among new tokens and full attention over a context chunk, on concatenated keys."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def validate_configuration(cls, device_capability, selector_config) -> list[str]:
        reasons = super().validate_configuration(device_capability, selector_config)
        vllm_config = get_current_vllm_config()
        if envs.VLLM_BATCH_INVARIANT and not _is_under_our_decode(vllm_config.attention_config):
            reasons.append(
                "with VLLM_BATCH_INVARIANT=1 it needs --attention-backend CUSTOM, which then takes all prefill: here "
                "results would depend on how cached context is cut into chunks"
            )
        kernel = MLABackendConfig.from_environment().kernel_for("prefill")
        try:
            problem = _problem(geometry_of(vllm_config.model_config.hf_text_config), selector_config.dtype)
            select("prefill", problem, device_of(vllm_config.device_config.device), kernel=kernel)
        except (UnsupportedMLA, ValueError) as error:
            reasons.append(str(error))
        return reasons

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        problem = _problem(layer_geometry(self), self.vllm_config.model_config.dtype)
        self._attention = _attention(problem, torch.device(self.vllm_config.device_config.device), self.scale)

    def supports_out(self) -> bool:
        return True

    def run_prefill_new_tokens(self, q, k, v, return_softmax_lse, out=None, output_scale=None):
        step = self._prefill_metadata
        starts = step.query_start_loc
        out, lse_NT = self._attend(q, k, v, starts, starts, step.max_query_len, causal=True, out=out)
        return (out, lse_NT) if return_softmax_lse else out

    def run_prefill_context_chunk(self, chunk=None, q=None, k=None, v=None, out=None, *, chunk_idx=None):
        chunk = compat.context_chunk_of_call(self._prefill_metadata, chunk, chunk_idx)
        return self._attend(
            q, k, v, chunk.query_start_B1, chunk.key_start_B1, chunk.max_query_len, causal=False, out=out
        )

    def _attend(self, q, k, v, query_start, key_start, max_query_len, *, causal, out):
        lse_NT = q.new_empty((self.num_heads, q.shape[0]), dtype=torch.float32)  # vLLM merges with heads first
        out, _ = self._attention.attend(
            q,
            k[..., : self.qk_nope_head_dim],
            k[..., self.qk_nope_head_dim :],
            v,
            query_start,
            key_start,
            max_query_len=max_query_len,
            causal=causal,
            out_TNV=out,
            lse_TN=lse_NT.T,
        )
        return out, lse_NT
