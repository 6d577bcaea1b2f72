"""Ask servers for answers, vLLM with our backend and with its own, in turn: `mla-backend bench serve`.

The servers, `vllm serve`, are all started before anything is measured and share the GPU; only one is asked at a time,
by vLLM's own client, each once a round, so that what slows one round slows all of them. The model is that of
`bench engine`: DeepSeek-V2-Lite's shape and weights that vLLM makes up, good for speed, never for correctness.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec

from mla_backend.bench.engine import Engine
from mla_backend.bench.machine import BenchmarkError, machine, need_gpu
from mla_backend.bench.results import write_csv
from mla_backend.bench.serve_cases import Experiment, Workload, need_room
from mla_backend.bench.serve_rows import COLUMNS, OURS, line, values_of
from mla_backend.bench.vllm_client import Client, arguments
from mla_backend.bench.vllm_server import Server, free_ports, means, options, stop, write_model

START_SECONDS, RUN_SECONDS = 480, 120  # the former with --compile, and several servers at the same time
WARM_TOKENS = 8


def need_vllm() -> None:
    if find_spec("vllm") is None:
        raise BenchmarkError("bench serve wants vLLM, which is not installed here: pip install '.[vllm]' in a checkout")


def free_bytes() -> int:
    """Of the GPU's memory."""
    import torch

    return torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM, which `timeout` sends, and SIGHUP of a lost terminal end this process as Ctrl-C does: no server is left
    behind on the GPU."""
    # One that is ignored, as `nohup` has SIGHUP, stays so.
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number, _frame) -> None:
    sys.exit(128 + number)


def run(
    engines: list[Engine],
    experiment: Experiment,
    *,
    rounds: int = 2,
    csv: pathlib.Path | None = None,
    logs: pathlib.Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Rows of COLUMNS, the medians of some rounds, and of each peer that has none, or not all, the reason.

    engines: ours among them, which must start and answer; peers that do not are left out.
    csv: written after every load.   logs: a folder for what servers and client print, kept.
    Raises BenchmarkError.
    """
    need_vllm()
    need_gpu()
    need_room(experiment, len(engines), free_bytes())
    with ended_in_order(), contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, logs = folder / "model", logs or folder / "logs"
        for place in (model, logs):
            place.mkdir(parents=True, exist_ok=True)
        write_model(model, experiment.model)
        measuring = _Measuring(experiment=experiment, rounds=rounds, csv=csv, model=model, logs=logs)
        stack.callback(measuring.client.stop)
        for speculative in (False, True):
            workloads = [one for one in experiment.workloads if one.speculative is speculative]
            if workloads:
                measuring.measure(engines, workloads, speculative=speculative)
    return measuring.rows, measuring.refusals


@dataclasses.dataclass(kw_only=True)
class _Measuring:
    """A run of the benchmark, and what it has found so far."""

    experiment: Experiment
    rounds: int
    csv: pathlib.Path | None
    model: pathlib.Path
    logs: pathlib.Path
    rows: list[dict] = dataclasses.field(default_factory=list)
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    # New prompts whenever servers are asked, or the cache would have them; the same for all servers.
    seeds: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def __post_init__(self):
        self.begin = time.monotonic()
        self.client = Client(self.logs / "client.log")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:4.0f} s  {text}", flush=True)

    def measure(self, engines: list[Engine], workloads: list[Workload], *, speculative: bool) -> None:
        """All loads of servers of one kind, which are started for them and stopped behind them."""
        started: list[Server] = []
        try:
            for engine, port in zip(engines, free_ports(len(engines)), strict=True):
                log = self.logs / f"{str(engine).replace(':', '-')}{'-ngram' * speculative}.log"
                given = options(engine, self.experiment, speculative=speculative)
                started.append(Server(engine, self.model, given, port=port, log=log))
            self.say(f"{len(started)} servers{' with n-gram speculation' * speculative} are starting")
            version = self.client.start()  # while they start
            facts = machine() | {"vllm": version, "layers": self.experiment.model["num_hidden_layers"]}
            facts |= {"compile": self.experiment.compile}
            ready = self.wait(list(started))
            for workload in workloads:
                for rate in dict.fromkeys((*workload.rates, math.inf)):  # short answers overlap more when all at once
                    self.ask_all(ready, warm(workload), rate, seed=next(self.seeds))
            self.say(f"{', '.join(str(server.engine) for server in ready)}: started and warm")
            for workload in workloads:
                for rate in workload.rates:
                    self.measure_load(ready, workload, rate, facts)
        finally:
            stop(started)
            self.client.stop()

    def wait(self, starting: list[Server]) -> list[Server]:
        """Those that are ready, in the order given."""
        end, ready = time.monotonic() + START_SECONDS, []
        while waiting := [server for server in starting if server not in ready]:
            for server in waiting:
                try:
                    if server.is_ready():
                        ready.append(server)
                        self.say(f"{server.engine} is ready")
                    elif time.monotonic() > end:
                        raise server.error(f"not ready within {START_SECONDS} s")
                except BenchmarkError as error:
                    self.lose(server, starting, error)
            time.sleep(0.2)
        return starting

    def lose(self, server: Server, servers: list[Server], error: BenchmarkError) -> None:
        """Take a peer from the servers. Raises the error where the server is ours."""
        if server.engine.backend == OURS:
            raise error
        servers.remove(server)
        stop([server])
        self.refusals.setdefault(str(server.engine), str(error).partition(" The end of its log:")[0])
        self.say(f"going on without {error}")

    def ask_all(self, servers: list[Server], workload: Workload, rate: float, *, seed: int, back: bool = False) -> dict:
        """What the client says of each, asked one after another, or in the opposite order. Peers that fail are lost."""
        answers = {}
        for server in servers[::-1] if back else list(servers):
            given = arguments(workload, rate=rate, seed=seed, url=server.url, model=self.model)
            try:
                before = server.totals()
                found = self.client.ask(given, seconds=RUN_SECONDS + workload.prompts / rate)
                need_all(found, workload)
                found |= means(before, server.totals())
            except BenchmarkError as error:
                self.lose(server, servers, server.error(f"{workload.name}, {rate:g} requests/s: {error}"))
            else:
                answers[server] = found
        return answers

    def measure_load(self, servers: list[Server], workload: Workload, rate: float, facts: dict) -> None:
        """Rows of the servers that answered in all rounds."""
        answers = [
            self.ask_all(servers, workload, rate, seed=next(self.seeds), back=number % 2 == 1)
            for number in range(self.rounds)
        ]
        load = {"workload": workload.name, "rate": f"{rate:g}", "prompts": workload.prompts, "rounds": self.rounds}
        for server in servers:
            row = facts | load | {"backend": str(server.engine)} | values_of([found[server] for found in answers])
            self.rows.append(row)
            self.say(line(row, [found[server]["output_throughput"] for found in answers]))
        if self.csv:
            write_csv(self.rows, self.csv, COLUMNS)


def warm(workload: Workload) -> Workload:
    """What is asked for first, at every rate and at once, for whatever compiles then, such as vLLM's kernel for
    mixtures of experts in a second or so: in measured rounds whoever is asked first would pay for all. Guesses need
    whole answers: there are none before an answer begins to repeat itself."""
    return workload if workload.speculative else dataclasses.replace(workload, output_tokens=WARM_TOKENS)


def need_all(found: dict, workload: Workload) -> None:
    """Raise BenchmarkError unless every request had its whole answer."""
    wanted = workload.prompts, workload.prompts * workload.output_tokens
    got = found["completed"], found["total_output_tokens"]
    if got != wanted:
        said = "".join(f"; vLLM's client: {error:.600}" for error in found["errors"])
        raise BenchmarkError(
            f"{wanted[0]} answers of together {wanted[1]} tokens were wanted, {got[0]} of together {got[1]} came{said}"
        )
