"""Time decode steps of whole engines, vLLM's or SGLang's, beside each other: `mla-backend bench engine`.

One model, one process a backend, all started before anything is timed and asked in turn, so that no backend has the
GPU at another temperature than the next. The model has the shape of DeepSeek-V2-Lite with few layers and random
weights: good for speed, never for correctness. Prompts are in the prefix cache when steps are timed.
"""

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import pathlib
import statistics
import tempfile
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import torch

from mla_backend.bench.machine import BenchmarkError, machine, need_gpu
from mla_backend.config import set_environment, variable
from mla_backend.models import geometry_of
from mla_kernels import CacheLayout, format_of

MODEL = {  # deepseek-ai/DeepSeek-V2-Lite's config.json, but for the number of layers
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
STEPS = 129
PAGE = 128  # tokens; no backend has larger ones
COLUMNS = (
    *("date", "gpu", "torch", "triton", "engine", "backend", "layers", "requests", "tokens"),
    *("step_ms", "graph_ms"),
)
HOSTS = {"vllm": "CUSTOM,FLASHMLA,FLASH_ATTN_MLA", "sglang": "mla_backend,fa3,flashmla,flashinfer,triton"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What every engine does.

    model: what its config.json says.  workloads: (requests, prompt tokens of each).  host: a name of HOSTS.
    """

    model: dict
    host: str = "vllm"
    workloads: tuple[tuple[int, int], ...] = ((64, 512), (64, 8192), (8, 32768), (1, 32768))

    @property
    def cache_tokens(self) -> int:
        """For the largest workload and some more: fixed, so that engines beside it change nothing, and all its
        requests run at once."""
        return max(requests * (tokens + STEPS + PAGE) for requests, tokens in self.workloads) + 64 * PAGE

    @property
    def cache_bytes(self) -> int:
        """As vLLM counts it."""
        layout = CacheLayout(
            geometry=geometry_of(SimpleNamespace(**self.model)), format=format_of(torch.bfloat16), page_size=PAGE
        )
        return layout.bytes_for(self.cache_tokens, num_layers=self.model["num_hidden_layers"])

    def prompts(self, requests: int, tokens: int) -> list[list[int]]:
        """Random token ids, the same for every engine."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(1000, (requests, tokens), generator=generator).tolist()


class StepTimes(NamedTuple):
    """Milliseconds of a decode step, and of its captured graph alone, without the host's work; None if it is hidden."""

    step_ms: float
    graph_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A backend as the host is told of it, and the environment that it runs in."""

    backend: str
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Engine":
        """`CUSTOM`, `FLASHMLA`; `CUSTOM:triton_splitkv` names our decode kernel."""
        backend, _, kernel = text.strip().partition(":")
        return cls(backend=backend, environment=((variable("decode"), kernel),) if kernel else ())

    def __str__(self) -> str:
        return ":".join((self.backend, *(value for _, value in self.environment)))


def serve(connection, folder: str, engine: Engine, experiment: Experiment) -> None:
    """A process's life: build the engine, then answer every workload that it is asked for with its times, until it is
    ended."""
    try:
        set_environment(dict(engine.environment))
        host = import_module(f"mla_backend.bench.{experiment.host}_engine")
        llm, version = host.start(folder, engine.backend, experiment)
        time_step = functools.partial(host.time_step, llm, experiment)
        for workload in experiment.workloads:
            time_step(*workload)  # whatever compiles at first use
        connection.send(version)
        while True:
            connection.send(time_step(*connection.recv()))
    except Exception as error:
        connection.send(BenchmarkError(f"{engine}: {type(error).__name__}: {error!s:.600}"))


class Worker:
    """A process that serves one engine."""

    def __init__(self, context, folder: str, engine: Engine, experiment: Experiment, target=serve):
        self.engine = engine
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, folder, engine, experiment))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def answer(self):
        """What it sends. Raises BenchmarkError: the one that it sends, or that it is gone."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            status = self.process.exitcode
            raise BenchmarkError(f"{self.engine}: its process ended with status {status}; its log is above") from None
        if isinstance(answer, BenchmarkError):
            raise answer
        return answer

    def ask(self, *workload: int):
        """The times of a workload."""
        with contextlib.suppress(ConnectionError):  # its end is what the answer will be
            self.connection.send(workload)
        return self.answer()

    def stop(self) -> None:
        """At once: nothing in it needs an orderly end, and SGLang's own processes end with it."""
        self.process.kill()
        self.process.join()


def _versions(workers: list[Worker]) -> dict[Worker, str]:
    """The engine's name and version from each as it is ready; the first that fails ends the wait."""
    waiting, versions = {worker.connection: worker for worker in workers}, {}
    while waiting:
        for connection in multiprocessing.connection.wait(list(waiting)):
            worker = waiting.pop(connection)
            versions[worker] = worker.answer()
    return versions


def _in_turn(workers: list[Worker], requests: int, tokens: int, rounds: int) -> list[tuple[StepTimes, ...]]:
    """Every worker's times: each worker once a round, so that what slows one round slows all of them."""
    return list(zip(*([worker.ask(requests, tokens) for worker in workers] for _ in range(rounds)), strict=True))


def _medians(times: tuple[StepTimes, ...]) -> dict[str, float | None]:
    by_name = zip(StepTimes._fields, zip(*times, strict=True), strict=True)
    return {name: None if None in ms else round(statistics.median(ms), 3) for name, ms in by_name}


def _listed(times: tuple[StepTimes, ...]) -> str:
    """All of them, sorted."""
    steps, graphs = (sorted(filter(None, ms)) for ms in zip(*times, strict=True))
    shown = ", ".join(f"{ms:.3f}" for ms in steps) + " ms a step"
    return shown + (f"; its graph alone {', '.join(f'{ms:.3f}' for ms in graphs)}" if graphs else "")


def run(engines: list[Engine], experiment: Experiment, *, rounds: int = 3, target=serve) -> list[dict]:
    """Rows of COLUMNS, the median of some rounds: every engine of a workload before the next workload.

    target: what a worker's process does.
    Raises BenchmarkError without a GPU and when an engine does not start or ends.
    """
    need_gpu()
    facts, layers, rows = machine(), experiment.model["num_hidden_layers"], []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pathlib.Path(folder, "config.json").write_text(json.dumps(experiment.model))
        workers = []
        for engine in engines:
            workers.append(Worker(context, folder, engine, experiment, target))
            stack.callback(workers[-1].stop)
        versions = _versions(workers)
        for requests, tokens in experiment.workloads:
            for worker, times in zip(workers, _in_turn(workers, requests, tokens, rounds), strict=True):
                row = {"engine": versions[worker], "backend": str(worker.engine), "layers": layers}
                rows.append(facts | row | {"requests": requests, "tokens": tokens} | _medians(times))
                print(f"{requests} x {tokens} tokens, {worker.engine}: {_listed(times)}", flush=True)
    return rows
