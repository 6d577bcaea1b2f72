"""How much of a model's cache fits, and how long reading it takes: arithmetic only."""

import math
from dataclasses import dataclass

import torch

from mla_backend.plan.model import Model
from mla_kernels import FORMATS, CacheLayout, expanded_bytes_per_token

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What serves the model.

    tensor_parallel, context_parallel: ranks (TP), and of those among which decode divides a request's tokens (DCP).
    memory_bytes, share: of one GPU, and the part of it that the engine takes.
    weight_bytes: of the whole model.  bytes_per_s: that a GPU reads.
    """

    tensor_parallel: int
    context_parallel: int
    memory_bytes: int
    share: float
    weight_bytes: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.tensor_parallel % self.context_parallel:
            raise ValueError(
                f"--dcp must divide --tp (vLLM makes its groups of those ranks), got {self.context_parallel} and "
                f"{self.tensor_parallel}"
            )

    @property
    def pool_bytes(self) -> int:
        """Left for the cache on one rank, activations not counted."""
        return max(0, int(self.memory_bytes * self.share) - self.weight_bytes // self.tensor_parallel)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to cache. Bytes are of all layers: of a token of the model, and of a token on one rank.

    tokens: that fit on all GPUs together.  requests: of `context` tokens.
    request_bytes: of one of those on the rank that holds most of it.  step_ms: to read that once, at least.
    """

    name: str
    token_bytes: int
    rank_bytes: float
    tokens: int
    requests: int
    request_bytes: int
    step_ms: float


def rows(model: Model, gpus: Gpus, context: int) -> list[Row]:
    """The latent in every format that holds it, then expanded heads in bf16: MHA, GQA with 8 groups, MQA.

    Tensor parallelism leaves the latent as it is on every rank; heads it divides, but no rank has less than one.
    Raises ValueError if it does not divide the model's heads.
    """
    if model.geometry.num_heads % gpus.tensor_parallel:
        raise ValueError(f"--tp must divide the model's {model.geometry.num_heads} heads, got {gpus.tensor_parallel}")
    made = []
    for form in filter(lambda form: form.holds(model.geometry), FORMATS.values()):
        latent = CacheLayout(geometry=model.geometry, format=form, page_size=1).row_bytes * model.layers
        made.append(_row(f"MLA, {form.name}", latent, latent / gpus.context_parallel, gpus, context))
    heads = model.geometry.num_heads
    for name, kv_heads in (("MHA", heads), ("GQA, 8 groups", min(8, heads)), ("MQA", 1)):
        one_head = expanded_bytes_per_token(model.geometry, torch.bfloat16, kv_heads=1) * model.layers
        mine = max(1, -(-kv_heads // gpus.tensor_parallel))
        made.append(_row(f"{name}, bf16", one_head * kv_heads, one_head * mine, gpus, context))
    return made


def _row(name: str, token_bytes: int, rank_bytes: float, gpus: Gpus, context: int) -> Row:
    request = max(1, math.ceil(rank_bytes * context))
    return Row(
        name=name,
        token_bytes=token_bytes,
        rank_bytes=rank_bytes,
        tokens=int(gpus.pool_bytes / rank_bytes),
        requests=int(gpus.pool_bytes // request),
        request_bytes=request,
        step_ms=1e3 * request / gpus.bytes_per_s,
    )
