"""`vllm bench serve` for `bench serve`: vLLM's own client in one process, which imports it once for all runs."""

import contextlib
import multiprocessing
import os
import pathlib

from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.serve_cases import Workload
from mla_backend.bench.serve_rows import ANSWERED
from mla_backend.bench.vllm_server import LOCAL
from mla_backend.config import set_environment

IMPORT_SECONDS = 120
COUNTED = ("completed", "failed", "total_output_tokens")


def arguments(workload: Workload, *, rate: float, seed: int, url: str, model: pathlib.Path) -> list[str]:
    """Options of `vllm bench serve`. A seed decides prompts and when they are sent.

    Greedy: with weights as vLLM makes them up, all tokens have almost the same probability.
    """
    return [
        *("--backend", "openai", "--base-url", url, "--model", str(model), "--tokenizer", str(model)),
        *workload.dataset(),
        *("--num-prompts", str(workload.prompts), "--request-rate", str(rate), "--seed", str(seed)),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"),
        "--save-detailed",  # keeps what each request that failed says
    ]


def answer(connection, log: str) -> None:
    """A process's life: measure each load that it is asked for, until it is ended."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    set_environment(LOCAL)
    try:
        import vllm
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        connection.send(vllm.__version__)
    except Exception as error:
        connection.send(BenchmarkError(f"vLLM's client does not start: {type(error).__name__}: {error!s:.600}"))
    while True:
        options = connection.recv()
        try:
            found = main(parser.parse_args(options))
            errors = sorted({error for error in found.get("errors") or () if error})
            connection.send({"errors": errors} | {key: found.get(key) for key in (*COUNTED, *ANSWERED.values())})
        except (Exception, SystemExit) as error:  # argparse leaves by the latter
            connection.send(BenchmarkError(f"vLLM's client: {type(error).__name__}: {error!s:.600}"))


class Client:
    """The process, started anew after a run that did not end in time."""

    def __init__(self, log: pathlib.Path, target=answer):
        self._log, self._target, self._process = log, target, None

    def start(self) -> str:
        """vLLM's version."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._target, args=(theirs, str(self._log)))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        return self._answer(IMPORT_SECONDS)

    def ask(self, options: list[str], *, seconds: float) -> dict:
        """What a run with these options measured. Raises BenchmarkError."""
        if self._process is None:
            self.start()
        with contextlib.suppress(ConnectionError):  # its end is what the answer will be
            self._connection.send(options)
        return self._answer(seconds)

    def _answer(self, seconds: float):
        try:
            if not self._connection.poll(seconds):
                raise BenchmarkError(f"vLLM's client: no answer within {seconds:g} s")
            found = self._connection.recv()
        except (EOFError, ConnectionError):
            self.stop()
            raise BenchmarkError(f"vLLM's client: its process ended\n{self.log_end()}") from None
        except BenchmarkError:
            self.stop()
            raise
        if isinstance(found, BenchmarkError):
            raise found
        return found

    def log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(f"  | {line[:240]}" for line in lines[-20:])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
