"""Programs in processes that are forked from one that has imported vLLM: to import it takes longer than most of them.

    python forked_runs.py              requests on standard input, answers on standard output, one JSON line each

A request is [code, arguments, folder, environment]: the code is executed in `folder`, in a process of its own with this
command line and environment, whose output goes to `OUTPUT` there. An answer is its exit status. Nothing of ours is
imported before the fork, but for vLLM's CPU platform.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import traceback

import torch
from serving_watch import FORGET, STAND_IN

OUTPUT = ("output.txt", "errors.txt")
SECONDS = 400  # that a program may take
READ_LATE = {  # variables that nobody reads while vLLM is imported
    *("TRITON_INTERPRET", STAND_IN, FORGET, "VLLM_MLA_DISABLE"),
    *("MLA_BACKEND_DECODE", "MLA_BACKEND_PREFILL", "MLA_BACKEND_MODEL_TYPES"),
}


class Server:
    """One process that has imported vLLM; variables that are read meanwhile are the same in all of its runs."""

    def __init__(self, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={"TORCHDYNAMO_DISABLE": "1", **os.environ, **environment},  # as engine_runner.py has it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, *request) -> int:
        """Exit status."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the process to fork from has ended with {self._process.wait()}"
        return json.loads(answer)


@functools.cache
def _server(interpreted: str) -> Server:
    """The server of this test process. Triton's functions are made for its interpreter, or not, when they are
    imported."""
    return Server(TRITON_INTERPRET=interpreted)


def python(code: str, *arguments: str, folder: pathlib.Path, **changes: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `python -c code arguments` in `folder`, in this environment with `changes`.

    The process is forked if it can be: no variable is changed that is read when vLLM is imported, and there is no GPU,
    which does not outlive a fork.
    """
    environment = {**os.environ, **changes}
    if set(changes) <= READ_LATE and not torch.cuda.is_available():
        server = _server(environment.get("TRITON_INTERPRET", "0"))
        status = server.run(code, arguments, str(folder), environment)
        return status, *((folder / name).read_text(errors="replace") for name in OUTPUT)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stdout, done.stderr


def _import_all() -> None:
    """What every engine imports."""
    names = ("entrypoints.llm", "sampling_params", "v1.engine.core", "v1.worker.cpu_worker")
    for name in (*names, "model_executor.models.deepseek_v2"):
        importlib.import_module(f"vllm.{name}")


def _execute(code: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """In the forked process: what `python -c` does; never returns."""
    signal.alarm(SECONDS)  # which ends it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in enumerate(OUTPUT, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, status = ["-c", *arguments], 1
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where vLLM may write as it likes
    _import_all()
    gc.collect()
    gc.freeze()  # collections in the forked processes leave the pages that they share alone
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _execute(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
