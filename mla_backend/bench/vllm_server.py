"""`vllm serve` as `bench serve` starts it: a group of processes that is ended as one."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException

from mla_backend.bench.engine import Engine
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.serve_cases import GUESSES, Experiment

STOP_SECONDS, KILL_SECONDS = 15, 5
LOG_LINES = 30
LOCAL = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # nothing between this machine and itself
ALONE = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # nor does a server ask for anything elsewhere
QUICK = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": GUESSES,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
# Of `/metrics`: seconds of all requests so far in the engine's queue, and from there to the first token.
TIMES = {"queue_ms": "vllm:request_queue_time_seconds", "prefill_ms": "vllm:request_prefill_time_seconds"}
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def write_model(folder: pathlib.Path, model: dict) -> None:
    """A config.json, and a tokenizer of as many words as the model has tokens.

    Words with blanks between come back as the same tokens, which prompts of an exact length need; and every token has a
    text, without which the client would take it for part of the next one. One word is longer than all others: vLLM
    refuses prompts of more characters than tokens times the longest word, and does not count blanks.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(model))
    end = "<end-of-sequence>"
    words = {end: 0} | {f"t{number}": number for number in range(1, model["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def options(engine: Engine, experiment: Experiment, *, speculative: bool) -> list[str]:
    """Of `vllm serve`, but for the model and the port."""
    workloads = [workload for workload in experiment.workloads if workload.speculative is speculative]
    values = {
        "load-format": "dummy",
        "attention-backend": engine.backend,
        "max-model-len": max(workload.length for workload in workloads) + 64,
        "max-num-seqs": max(workload.prompts for workload in workloads),
        "kv-cache-memory-bytes": experiment.cache_bytes,
        # Says nothing beside those bytes, but vLLM refuses to start where less than this share of memory is free.
        "gpu-memory-utilization": 0.02,
        "uvicorn-log-level": "warning",
    }
    if not experiment.compile:
        values["compilation-config"] = json.dumps(QUICK)
    if speculative:
        values["speculative-config"] = json.dumps(SPECULATION)
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """A process group that serves one backend; its log is a file."""

    def __init__(self, engine: Engine, model: pathlib.Path, arguments: list[str], *, port: int, log: pathlib.Path):
        self.engine, self.log, self.url = engine, log, f"http://127.0.0.1:{port}"
        variables = {**LOCAL, **ALONE, **dict(engine.environment)}
        # `env` adds to what this process has, which only config.py reads.
        command = ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable]
        command += ["-m", "vllm.entrypoints.cli.main", "serve", str(model), *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """Raises BenchmarkError when it has ended."""
        status = self.process.poll()
        if status is not None:
            raise self.error(f"its server ended with status {status}")
        try:
            with _OPENER.open(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def totals(self) -> dict[str, float]:
        """Sums of TIMES and counts of their requests since the start, by the names that `/metrics` has for them. Raises
        BenchmarkError when the server does not say."""
        from prometheus_client.parser import text_string_to_metric_families

        try:
            with _OPENER.open(f"{self.url}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except (OSError, HTTPException) as error:
            raise BenchmarkError(f"no answer from {self.url}/metrics: {type(error).__name__}: {error}") from None
        families = list(text_string_to_metric_families(text))
        wanted = {f"{name}_{end}" for name in TIMES.values() for end in ("sum", "count")}
        return {sample.name: sample.value for family in families for sample in family.samples if sample.name in wanted}

    def error(self, what: str) -> BenchmarkError:
        """With the end of its log."""
        text = self.log.read_text(errors="replace")
        end = "\n".join(f"  | {line[:240]}" for line in text.splitlines()[-LOG_LINES:])
        return BenchmarkError(f"{self.engine}: {what}{cause(text)}. The end of its log:\n{end}")

    def terminate(self) -> None:
        """As a process manager does it: the process that was started ends the others."""
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        if self.has_processes():
            with contextlib.suppress(ProcessLookupError):  # the last one ended just now
                os.killpg(self.process.pid, signal.SIGKILL)

    def has_processes(self) -> bool:
        self.process.poll()  # or it would stay in the group as a zombie
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            return True
        return False


def means(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Milliseconds of TIMES between two `totals`, means over the requests that ended between them."""
    return {
        name: 1000 * (after[f"{key}_sum"] - before.get(f"{key}_sum", 0)) / requests
        for name, key in TIMES.items()
        if (requests := after.get(f"{key}_count", 0) - before.get(f"{key}_count", 0))
    }


def cause(log: str) -> str:
    """The first error of a log: what stands at its end is often only that the engine did not start."""
    lines = (line for line in log.splitlines() if " WARNING " not in line)
    found = (re.search(r"\b\w+(?:Error|Exception): \S.*", line) for line in lines)
    first = next(filter(None, found), None)
    return f": {first.group():.400}" if first else ""


def stop(servers: list[Server]) -> None:
    """All of them at the same time; what does not end is killed."""
    for server in servers:
        server.terminate()
    _wait(servers, STOP_SECONDS)
    for server in servers:
        server.kill()
    _wait(servers, KILL_SECONDS)


def _wait(servers: list[Server], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(server.has_processes() for server in servers) and time.monotonic() < end:
        time.sleep(0.1)
