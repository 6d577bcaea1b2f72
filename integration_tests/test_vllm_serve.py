"""What a user of the server does: `vllm serve MODEL --attention-backend CUSTOM`, asked over HTTP.

The server runs as vLLM runs it, in several processes that are spawned and load the plugin anew. One server answers all
tests of this file; its cache is small, so that requests also have to wait for it.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version

import pytest
from harness import assert_same_answers, free_port, kernels_env, prompts

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")  # the openai client is made of it

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS, COMMAND_SECONDS = 240, 60, 60, 180
MODEL = "tiny"
MAX_MODEL_LEN = 1024
LAYERS, ROW_BYTES = 2, 2304
CACHE_BYTES = 1280 * LAYERS * ROW_BYTES  # 20 pages of 64 tokens: one request of full length, but not two of 577
OPTIONS = [
    *("--attention-backend", "CUSTOM", "--enforce-eager", "--dtype", "float32"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(CACHE_BYTES)),
]


def vllm_command(*arguments) -> list[str]:
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return [shutil.which("vllm", path=places) or "vllm", *map(str, arguments)]


def environment() -> dict[str, str]:
    """vLLM's own default of several processes, whatever the caller has set. Nothing here leaves this machine."""
    local = {"VLLM_NO_USAGE_STATS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **kernels_env("torch"), **local, **ours}


def address(port: int) -> tuple[str, ...]:
    return ("--host", "127.0.0.1", "--port", str(port))


def run_vllm(*arguments, cwd) -> tuple[int, str]:
    """Exit status and everything printed by a `vllm` command that ends by itself."""
    done = subprocess.run(
        vllm_command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    return done.returncode, done.stdout


def wait_until(is_true, what: str, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


class Server:
    """A running `vllm serve`."""

    def __init__(self, model, folder: pathlib.Path):
        self._log = folder / "server.log"
        port = free_port()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                vllm_command("serve", model, *OPTIONS, "--served-model-name", MODEL, *address(port)),
                env=environment(),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own: what it leaves behind can be found
            )
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=ANSWER_SECONDS)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_SECONDS, http_client=self.http
        )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, f"the server died with status {self.process.returncode}"
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def complete(self, prompt: list[int], max_tokens: int = 12) -> dict:
        """Greedy answer to one prompt of token ids, as `assert_same_answers` takes it."""
        asked = {"max_tokens": max_tokens, "temperature": 0, "logprobs": 1}
        extra = {"return_token_ids": True, "ignore_eos": True}
        answer = self.client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **asked)
        choice = answer.choices[0]
        return {"tokens": choice.model_dump()["token_ids"], "logprobs": choice.logprobs.token_logprobs}

    def complete_all(self, batch: list[list[int]], max_tokens: int = 12) -> list[dict]:
        """All prompts at once, each a request of its own."""
        with ThreadPoolExecutor(len(batch)) as threads:
            return list(threads.map(lambda prompt: self.complete(prompt, max_tokens), batch))

    def metric(self, name: str) -> float:
        """A number of /metrics, summed over its labels."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
        assert lines, f"/metrics has no {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def is_idle(self) -> bool:
        return self.metric("vllm:num_requests_running") == self.metric("vllm:num_requests_waiting") == 0

    def has_processes(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def stop(self) -> int:
        """What Ctrl-C or a process manager does. Returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def serving(model, folder: pathlib.Path):
    """A server that answers; at the end it must stop when asked, with status 0, and leave no process behind."""
    server = Server(model, folder)
    try:
        wait_until(server.is_healthy, "the server is healthy", seconds=START_SECONDS)
        yield server
        assert server.stop() == 0
        wait_until(lambda: not server.has_processes(), "all processes of the server are gone", seconds=STOP_SECONDS)
    except BaseException:
        print(server.log()[-20_000:])  # the reason stands above tracebacks of two processes
        raise
    finally:
        if server.has_processes():
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(STOP_SECONDS)
        server.http.close()


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints()


@pytest.mark.parametrize(
    ("options", "helpful"),
    [
        (["--attention-backend", "CUSTUM"], ("Unknown attention backend: 'CUSTUM'", "CUSTOM")),
        ([*OPTIONS, "--kv-cache-dtype", "fp8_e5m2"], ("fp8_e4m3, fp8_ds_mla, got fp8_e5m2", "or leave the option out")),
    ],
    ids=["typo", "fp8_e5m2-cache"],
)
def test_mistake_on_the_command_line(folder, tmp_path, options, helpful):
    """Before the first test that needs the server, so that it does not run beside these."""
    status, log = run_vllm("serve", folder, *options, *address(free_port()), cwd=tmp_path)
    assert status > 0, "a status of its own, neither success nor a signal"
    for part in helpful:
        assert part in log


@pytest.fixture(scope="module")
def running(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running):
    """The server; pytest shows what it logged meanwhile beside a test that fails."""
    seen = len(running.log())
    yield running
    print(running.log()[seen:])


def test_completion(server, folder, oracle):
    prompt = prompts((17,))
    assert_same_answers([server.complete(prompt[0])], oracle(folder, prompt))


def test_chat_is_streamed(server, folder, oracle):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "How many tokens fit?"}]
    asked = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    stream = server.client.chat.completions.create(model=MODEL, messages=messages, stream=True, **asked)
    pieces = [piece.choices[0].delta.content for piece in stream]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert "".join(piece or "" for piece in pieces) == tokenizer.decode(oracle(folder, [prompt])[0].tokens)
    assert len([piece for piece in pieces if piece]) > 1


def test_uneven_requests_at_once(server, folder, oracle):
    assert_same_answers(server.complete_all(prompts()), oracle(folder, prompts()))


def test_more_requests_than_the_cache_holds(server, folder, oracle):
    """Some wait, some are preempted and begin again; each answers as if alone.

    Two that overlap are too many, also where a loaded machine lets requests arrive one after another: each begins with
    9 of the 19 pages that vLLM gives away of 20, and soon wants one more.
    """
    batch, max_tokens = prompts((570,) * 5, seed=1), 60
    before = server.metric("vllm:num_preemptions_total")
    assert_same_answers(server.complete_all(batch, max_tokens), oracle(folder, batch, max_tokens))
    assert server.metric("vllm:num_preemptions_total") > before


def test_client_that_goes_away(server, folder, oracle):
    """A stream closed by the client ends the request; the next ones find their pages free and unspoilt.

    On a loaded machine the engine may have written a whole answer before a client reads its first words. Then nothing
    was abandoned, and the client goes away once more.
    """
    wait_until(server.is_idle, "requests of other tests have ended", seconds=ANSWER_SECONDS)
    (prompt,) = prompts((65,), seed=2)
    wanted = MAX_MODEL_LEN - len(prompt)
    assert any(_abandon(server, prompt, wanted) < wanted for _ in range(15)), "no answer was cut short"
    batch = [prompt, *prompts((150, 450), seed=3)]
    assert_same_answers(server.complete_all(batch), oracle(folder, batch))


def _abandon(server, prompt: list[int], max_tokens: int) -> float:
    """Ask for an answer, close the stream after three parts of it; how many tokens the engine had written by then."""
    before = server.metric("vllm:generation_tokens_total")
    stream = server.client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    wait_until(server.is_idle, "the abandoned request has ended", seconds=ANSWER_SECONDS)
    return server.metric("vllm:generation_tokens_total") - before


def test_prompt_that_is_too_long(server, folder, oracle):
    with pytest.raises(openai.BadRequestError, match=str(MAX_MODEL_LEN)):
        server.complete(prompts((MAX_MODEL_LEN + 1,))[0])
    prompt = prompts((9,))
    assert_same_answers([server.complete(prompt[0])], oracle(folder, prompt))


def test_start_up_line_is_said_once(server):
    """One process has the layers, and says it for all of them."""
    ours = [line for line in server.log().splitlines() if f"mla_backend {version('mla-backend')}: " in line]
    assert len(ours) == 1, ours


def test_bench_serve(server, folder, tmp_path):
    load = ("--random-input-len", "64", "--random-output-len", "16", "--num-prompts", "8", "--max-concurrency", "4")
    status, log = run_vllm(
        *("bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", MODEL, "--tokenizer", folder),
        *("--dataset-name", "random", *load, "--ignore-eos", "--save-result", "--result-filename", "bench.json"),
        cwd=tmp_path,
    )
    assert status == 0, log[-4000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (8, 0, 8 * 16)
