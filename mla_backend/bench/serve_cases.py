"""What `bench serve` asks servers for, and what a server takes of the GPU."""

import math
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from mla_backend.bench.engine import PAGE
from mla_backend.bench.machine import BenchmarkError
from mla_backend.models import geometry_of
from mla_kernels import CacheLayout, format_of

PEERS = ("FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")
GUESSES = 3  # of n-gram speculation: a step has up to four query tokens a request
# Beside weights and cache: CUDA's context, activations of 8192 tokens, what cached context expands to, graphs.
OTHER_BYTES = 7 << 30


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of one kind.

    input_tokens: of a prompt, of which the first `shared_tokens` are the same in all of a run.
    rates: requests a second, of which each is measured; infinite for all at once.
    speculative: to servers that guess by n-grams.
    """

    name: str
    input_tokens: int
    output_tokens: int
    prompts: int
    rates: tuple[float, ...]
    shared_tokens: int = 0
    speculative: bool = False

    @property
    def length(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def cache_tokens(self) -> int:
        """All requests at once, each with a page that is partly full and one for guesses."""
        return self.shared_tokens + self.prompts * (self.length - self.shared_tokens + 2 * PAGE)

    def dataset(self) -> list[str]:
        """Options of `vllm bench serve` that make these prompts."""
        if not self.shared_tokens:
            lengths = {"input-len": self.input_tokens, "output-len": self.output_tokens}
            return _options("random", {f"random-{name}": value for name, value in lengths.items()})
        lengths = {
            "prefix-len": self.shared_tokens,
            "suffix-len": self.input_tokens - self.shared_tokens,
            "num-prefixes": 1,
            "output-len": self.output_tokens,
        }
        return _options("prefix_repetition", {f"prefix-repetition-{name}": value for name, value in lengths.items()})


def _options(dataset: str, values: dict[str, int]) -> list[str]:
    return ["--dataset-name", dataset, *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


WORKLOADS = (
    Workload(name="1k", input_tokens=1024, output_tokens=1024, prompts=32, rates=(8, math.inf)),
    Workload(name="32k", input_tokens=32768, shared_tokens=31744, output_tokens=512, prompts=16, rates=(4, math.inf)),
    Workload(name="ngram", input_tokens=1024, output_tokens=1024, prompts=32, rates=(8, math.inf), speculative=True),
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What every server does.

    model: what its config.json says.   compile: as vLLM compiles by default, instead of starting quickly.
    """

    model: dict
    workloads: tuple[Workload, ...] = WORKLOADS
    compile: bool = False

    @property
    def cache_bytes(self) -> int:
        """For the largest workload and some more, as vLLM counts it: no request of ours waits for a page."""
        layout = CacheLayout(
            geometry=geometry_of(SimpleNamespace(**self.model)), format=format_of(torch.bfloat16), page_size=PAGE
        )
        tokens = max(workload.cache_tokens for workload in self.workloads) + 64 * PAGE
        return layout.bytes_for(tokens, num_layers=self.model["num_hidden_layers"])

    @property
    def server_bytes(self) -> int:
        """Of GPU memory, about."""
        return weight_bytes(self.model) + self.cache_bytes + OTHER_BYTES


def weight_bytes(model: dict) -> int:
    """In 16 bits; norms and what an MLA layer keeps of `kv_b_proj` a second time are not worth counting."""
    hidden, heads, latent = model["hidden_size"], model["num_attention_heads"], model["kv_lora_rank"]
    nope, rope, v = model["qk_nope_head_dim"], model["qk_rope_head_dim"], model["v_head_dim"]
    attention = hidden * (heads * (nope + rope + v) + latent + rope) + latent * heads * (nope + v)
    experts = model["n_routed_experts"] + model["n_shared_experts"]
    sparse, dense = 3 * hidden * model["moe_intermediate_size"] * experts, 3 * hidden * model["intermediate_size"]
    layers, first = model["num_hidden_layers"], model["first_k_dense_replace"]
    return 2 * (2 * model["vocab_size"] * hidden + layers * attention + first * dense + (layers - first) * sparse)


def need_room(experiment: Experiment, servers: int, free_bytes: int) -> None:
    """Raise BenchmarkError where the servers that are there at the same time do not fit."""
    if servers * experiment.server_bytes <= free_bytes:
        return
    layers, gib = experiment.model["num_hidden_layers"], 1 << 30
    fits = [n for n in range(1, layers) if servers * with_layers(experiment, n).server_bytes <= free_bytes]
    change = f"--layers {max(fits)}" if fits else "fewer backends in --against"
    raise BenchmarkError(
        f"{servers} servers of {layers} layers want about {servers * experiment.server_bytes / gib:.0f} GiB of GPU "
        f"memory at the same time, {free_bytes / gib:.0f} GiB are free: take {change}"
    )


def with_layers(experiment: Experiment, layers: int) -> Experiment:
    return replace(experiment, model=experiment.model | {"num_hidden_layers": layers})


def chosen_workloads(names: str, rates: str | None, known: tuple[Workload, ...] = WORKLOADS) -> tuple[Workload, ...]:
    """Workloads of a comma-separated list, with other rates where these are given. Raises ValueError."""
    wanted = [name for name in re.split(r"[,\s]+", names) if name]
    if unknown := set(wanted) - {workload.name for workload in known}:
        listed = ", ".join(workload.name for workload in known)
        raise ValueError(f"--workloads: unknown workload {', '.join(sorted(unknown))}; choose from {listed}")
    if not wanted:
        raise ValueError("--workloads names none; leave it out for all")
    found = (workload for workload in known if workload.name in wanted)
    if rates is None:
        return tuple(found)
    return tuple(replace(workload, rates=parsed_rates(rates)) for workload in found)


def parsed_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(float(rate) for rate in text.split(",")))
    except ValueError:
        rates = ()
    if not rates or not all(rate > 0 for rate in rates):
        raise ValueError(f"--rates must be requests a second, such as 4,16,inf; got {text!r}")
    return rates
