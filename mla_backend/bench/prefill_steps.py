"""Time what a layer of vLLM does for prefill, its `forward_mha`: ours beside vLLM's own with FlashAttention-3.

A model of one layer with random weights, one process a backend (engine.py), whose prompts make exactly the step that is
wanted; vllm_prefill_engine.py times the layer in it. vLLM's own `forward_mha` is asked for under its TRITON_MLA, which
sends it every prefill: FLASH_ATTN_MLA would take up to 512 new tokens for decode.
"""

import contextlib
import json
import multiprocessing
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from types import SimpleNamespace
from typing import NamedTuple

import torch

from mla_backend.bench.engine import MODEL, PAGE, Engine, Worker, serve
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.prefill_cases import SHAPE, StepCase
from mla_backend.config import variable
from mla_backend.models import geometry_of
from mla_kernels import CacheLayout, format_of

PEERS = {"fa3": Engine(backend="TRITON_MLA+FLASH_ATTN")}
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What every engine does.

    model: what its config.json says.  workloads: (new tokens, cached tokens) of a request.
    eager: whether its calls are timed as the host makes them, instead of in a CUDA graph.
    """

    model: dict
    workloads: tuple[tuple[int, int], ...]
    eager: bool = False
    host: str = "vllm_prefill"

    @property
    def longest(self) -> int:
        return max(new + cached for new, cached in self.workloads)

    @property
    def cache_bytes(self) -> int:
        """As vLLM counts it, for a few prompts of the longest."""
        geometry = geometry_of(SimpleNamespace(**self.model))
        layout = CacheLayout(geometry=geometry, format=format_of(torch.bfloat16), page_size=PAGE)
        return layout.bytes_for(4 * self.longest + 64 * PAGE, num_layers=self.model["num_hidden_layers"])


class StepCost(NamedTuple):
    """Microseconds of a layer's step, and bytes that it allocates at most at a time. What an engine holds between
    steps, such as room for gathered rows, is not in these."""

    us: float
    peak_bytes: int


def why_not() -> str | None:
    """Why there are no steps to be timed here; None if there are."""
    if find_spec("vllm") is None:
        return "needs the package vllm, which is not installed"
    return None


def run(
    cases: list[StepCase],
    *,
    peers,
    refused: Callable[[str, str, StepCase], None],
    kernel: str | None = None,
    eager: bool = False,
    model: dict = MODEL,
    engines: dict[str, Engine] = PEERS,
    target=serve,
) -> Iterator[dict]:
    """A row for each case, without what the machine is. `refused(peer, reason, case)` hears why a peer has none.

    kernel: our prefill kernel.  eager: as in Experiment.  target: what an engine's process does.
    Raises BenchmarkError when our engine does not start, or computes something else than attention.
    """
    named = ((variable("prefill"), kernel),) if kernel else ()
    wanted = {"ours": Engine(backend="CUSTOM+CUSTOM", environment=named)}
    wanted |= {peer: engine for peer, engine in engines.items() if peer in peers}
    for heads, of_heads in groupby(sorted(cases, key=lambda case: case.heads), lambda case: case.heads):
        mine = list(of_heads)
        layer = {"num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads}
        workloads = tuple((case.tokens, case.context) for case in mine)
        experiment = Experiment(model=model | layer, workloads=workloads, eager=eager)
        yield from _of_layer(mine, experiment, wanted, refused, target)


def _of_layer(cases, experiment: Experiment, engines: dict[str, Engine], refused, target) -> Iterator[dict]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pathlib.Path(folder, "config.json").write_text(json.dumps(experiment.model))
        workers = {}
        for name, engine in engines.items():
            workers[name] = Worker(context, folder, engine, experiment, target)
            stack.callback(workers[name].stop)
        versions = {}
        for name, worker in list(workers.items()):
            try:
                versions[name] = worker.answer()
            except BenchmarkError as error:
                if name == "ours":
                    raise
                del workers[name]
                for case in cases:
                    refused(name, str(error), case)
        for case in cases:
            costs = {name: [] for name in workers}
            for _ in range(ROUNDS):  # each once a round, so that what slows one round slows all
                for name, worker in workers.items():
                    costs[name].append(worker.ask(case.tokens, case.context))
            row = {"case": case.name} | {name: getattr(case, name) for name in SHAPE}
            row |= {"kernel": f"forward_mha, {versions['ours']}", "limit_us": round(case.limit_us, 2)}
            for name, mine in costs.items():
                row[f"{name}_us"] = round(statistics.median(cost.us for cost in mine), 2)
                row[f"{name}_bytes"] = max(cost.peak_bytes for cost in mine)
            yield row
