"""`bench serve`: one run with a real server on this CPU, where times mean nothing, and everything else without one."""

import dataclasses
import math
import os
import random
import signal
import sys
import time
from typing import ClassVar

import pytest
from bench_rows import FACTS, TINY_MODEL

from mla_backend.bench import serve, serve_cases, serve_rows, vllm_server
from mla_backend.bench.engine import MODEL, Engine
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.report import show_serve
from mla_backend.bench.serve_cases import Experiment, Workload
from mla_backend.bench.vllm_client import Client, arguments
from mla_backend.cli import application

TINY = MODEL | TINY_MODEL
OURS, PEER = Engine(backend="CUSTOM"), Engine(backend="FLASHMLA")
SHORT = Workload(name="1k", input_tokens=32, output_tokens=8, prompts=3, rates=(math.inf,))
SHARED = Workload(name="32k", input_tokens=300, shared_tokens=256, output_tokens=8, prompts=3, rates=(20,))
GUESSED = Workload(name="ngram", input_tokens=32, output_tokens=96, prompts=3, rates=(math.inf,), speculative=True)
ANSWER = {
    "errors": [],
    "completed": 3,
    "failed": 0,
    "total_output_tokens": 24,
    "output_throughput": 100.0,
    "median_ttft_ms": 10.0,
    "median_tpot_ms": 2.0,
    "p99_tpot_ms": 4.0,
    "spec_decode_acceptance_length": None,
}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """This machine, as if it had a GPU with room."""
    monkeypatch.setattr(serve, "need_gpu", lambda: None)
    monkeypatch.setattr(serve, "machine", lambda: FACTS)
    monkeypatch.setattr(serve, "free_bytes", lambda: 1 << 40)


def test_real_servers(tmp_path, monkeypatch, capsys):
    """Ours and one that vLLM does not know; each kind of workload, with the real client."""
    pytest.importorskip("vllm")
    started = []

    class Recorded(vllm_server.Server):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            started.append(self)

    monkeypatch.setattr(serve, "Server", Recorded)
    engines = [Engine.parse("CUSTOM:torch_decode"), Engine(backend="UNKNOWN")]
    experiment = Experiment(model=TINY, workloads=(SHORT, SHARED, GUESSED))
    rows, refusals = serve.run(engines, experiment, csv=tmp_path / "rows.csv", logs=tmp_path / "logs")

    assert [(row["workload"], row["rate"], row["backend"]) for row in rows] == [
        ("1k", "inf", "CUSTOM:torch_decode"),
        ("32k", "20", "CUSTOM:torch_decode"),
        ("ngram", "inf", "CUSTOM:torch_decode"),
    ]
    assert all(row[name] > 0 for row in rows for name in serve_rows.MEASURES)
    assert all(0 < row["prefill_ms"] < row["queue_ms"] + row["prefill_ms"] < 60_000 for row in rows)
    assert rows[0]["tokens_a_check"] is None
    assert rows[2]["tokens_a_check"] > 2, "answers of made up weights repeat themselves, and guesses are taken"
    assert list(refusals) == ["UNKNOWN"]
    assert "Unknown attention backend: 'UNKNOWN'" in refusals["UNKNOWN"]
    header, *lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert header.split(",") == list(serve_rows.COLUMNS)
    assert len(lines) == 3
    assert "decode torch_decode" in (tmp_path / "logs/CUSTOM-torch_decode-ngram.log").read_text()
    assert len(started) == 4
    assert not any(server.has_processes() for server in started)
    assert "1k at inf/s, CUSTOM:torch_decode: " in capsys.readouterr().out


class StandIn:
    """A server without processes. It is there at once, or has an `end`."""

    ends: ClassVar[dict] = {}

    def __init__(self, engine, model, arguments, *, port, log):
        self.engine, self.arguments, self.url, self.running = engine, arguments, f"http://{port}", True
        self.requests = 0

    def is_ready(self):
        end = self.ends.get(self.engine.backend)
        if end == "ended":
            raise self.error("its server ended with status 1")
        return end is None

    def totals(self):
        """Each asking for them comes behind one more request, which was in the queue for 1 ms and prefilled in 2."""
        self.requests += 1
        return {
            f"{name}_{end}": self.requests * value
            for name, seconds in zip(vllm_server.TIMES.values(), (0.001, 0.002), strict=True)
            for end, value in (("sum", seconds), ("count", 1))
        }

    def error(self, what):
        return BenchmarkError(f"{self.engine}: {what}. The end of its log:\n  | ...")

    def terminate(self):
        self.running = False

    kill = terminate

    def has_processes(self):
        return self.running


@pytest.fixture
def stand_ins(monkeypatch):
    """patch(ends, answer) -> (servers, asked): servers without processes, and a client that says `answer(options)`."""

    def patch(ends=None, answer=lambda options: ANSWER):
        servers, asked = [], []

        class Recorded(StandIn):
            def __init__(self, *given, **options):
                super().__init__(*given, **options)
                self.ends = ends or {}
                servers.append(self)

        class Answering:
            def __init__(self, log):
                pass

            def start(self):
                return "0"

            def ask(self, options, *, seconds):
                asked.append(options)
                found = answer(options)
                return found | {"total_output_tokens": found["completed"] * (8 if "random" in options else 96)}

            def stop(self):
                pass

        monkeypatch.setattr(serve, "Server", Recorded)
        monkeypatch.setattr(serve, "Client", Answering)
        monkeypatch.setattr(serve, "write_model", lambda *_: None)
        monkeypatch.setattr(serve, "need_vllm", lambda: None)
        return servers, asked

    return patch


def value(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def test_every_server_is_asked_once_a_round_for_the_same(stand_ins):
    servers, asked = stand_ins()
    rows, refusals = serve.run([OURS, PEER], Experiment(model=TINY, workloads=(SHORT,)), rounds=2)
    assert [server.engine for server in servers] == [OURS, PEER]
    ours, peer = (server.url for server in servers)
    told = [(value(options, "--base-url"), value(options, "--seed")) for options in asked]
    assert told == [(ours, "0"), (peer, "0"), (ours, "1"), (peer, "1"), (peer, "2"), (ours, "2")]
    assert [row["backend"] for row in rows] == ["CUSTOM", "FLASHMLA"]
    assert rows[0] | FACTS == rows[0]
    assert (rows[0]["vllm"], rows[0]["layers"], rows[0]["rounds"], rows[0]["tpot_ms"]) == ("0", 1, 2, 2.0)
    assert not refusals
    assert not any(server.running for server in servers)


def test_every_load_is_asked_for_before_any_is_measured(stand_ins):
    """With prompts of its own: vLLM compiles kernels when it first meets some numbers of tokens."""
    _, asked = stand_ins()
    loads = dataclasses.replace(SHORT, rates=(4, 2))
    serve.run([OURS], Experiment(model=TINY, workloads=(loads,)), rounds=2)
    told = [(value(options, "--request-rate"), value(options, "--seed")) for options in asked]
    assert told == [(rate, str(seed)) for seed, rate in enumerate(["4", "2", "inf", "4", "4", "2", "2"])]


@pytest.mark.parametrize(
    ("end", "reason"), [("ended", "its server ended with status 1"), ("slow", "not ready within 0 s")]
)
def test_peer_that_does_not_start_is_left_out(stand_ins, monkeypatch, end, reason):
    monkeypatch.setattr(serve, "START_SECONDS", 0)
    stand_ins({"FLASHMLA": end})
    rows, refusals = serve.run([OURS, PEER], Experiment(model=TINY, workloads=(SHORT,)))
    assert [row["backend"] for row in rows] == ["CUSTOM"]
    assert refusals == {"FLASHMLA": f"FLASHMLA: {reason}."}


def test_ours_must_start(stand_ins):
    servers, _ = stand_ins({"CUSTOM": "ended"})
    with pytest.raises(BenchmarkError, match=r"CUSTOM: its server ended with status 1(?s:.*)  \| \.\.\."):
        serve.run([OURS, PEER], Experiment(model=TINY, workloads=(SHORT,)))
    assert not any(server.running for server in servers)


@pytest.mark.parametrize("who", ["CUSTOM", "FLASHMLA"])
def test_answers_that_are_missing(stand_ins, who):
    """After a good warm-up and first round, one request fails."""
    missing = {"completed": 2, "errors": ["Server disconnected"]}
    servers, asked = stand_ins(answer=lambda options: ANSWER | (missing if fails(options) else {}))

    def fails(options):
        server = next(server for server in servers if server.url == value(options, "--base-url"))
        return server.engine.backend == who and value(options, "--seed") == "2"

    wanted = f"{who}: 1k, inf requests/s: 3 answers of together 24 tokens were wanted, 2 of together 16 came"
    wanted += "; vLLM's client: Server disconnected"
    experiment = Experiment(model=TINY, workloads=(SHORT,))
    if who == "CUSTOM":
        with pytest.raises(BenchmarkError, match=wanted):
            serve.run([OURS, PEER], experiment)
    else:
        rows, refusals = serve.run([OURS, PEER], experiment)
        assert [row["backend"] for row in rows] == ["CUSTOM"]
        assert refusals == {who: f"{wanted}."}
    assert len(asked) > 4


def test_peer_that_goes_away_is_left_out(stand_ins, monkeypatch):
    """Asked for what it counts, before the client is: a server that has ended answers nobody."""
    stand_ins()

    def totals(self):
        return (vllm_server.Server if self.engine == PEER else StandIn).totals(self)

    monkeypatch.setattr(serve.Server, "totals", totals)
    rows, refusals = serve.run([OURS, PEER], Experiment(model=TINY, workloads=(SHORT,)))
    assert [row["backend"] for row in rows] == ["CUSTOM"]
    assert "no answer from http://" in refusals["FLASHMLA"]


def test_what_servers_count(stand_ins, capsys):
    stand_ins()
    rows, _ = serve.run([OURS], Experiment(model=TINY, workloads=(SHORT,)))
    assert (rows[0]["queue_ms"], rows[0]["prefill_ms"], rows[0]["compile"]) == (1, 2, False)
    assert "(1.0 queued, then 2.0 in the engine)" in capsys.readouterr().out
    unknown = rows[0] | serve_rows.values_of([ANSWER])
    assert "TTFT 10.0 ms, TPOT" in serve_rows.line(unknown, [100.0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_servers(stand_ins, number, request):
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it
    request.addfinalizer(lambda: signal.signal(number, before))
    servers, _ = stand_ins(answer=lambda options: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit):
        serve.run([OURS], Experiment(model=TINY, workloads=(SHORT,)))
    assert not servers[0].running
    assert signal.getsignal(number) is signal.SIG_DFL


def silent(connection, log):
    connection.send("0")
    time.sleep(60)


def dies(connection, log):
    connection.send("0")
    with open(log, "w") as file:
        file.write("last words\n")
    connection.recv()
    os._exit(3)


def test_client_that_does_not_answer(tmp_path):
    """It is started anew for the next question."""
    client = Client(tmp_path / "log", target=silent)
    for _ in range(2):
        with pytest.raises(BenchmarkError, match=r"no answer within 0\.1 s"):
            client.ask([], seconds=0.1)


def test_client_that_dies(tmp_path):
    client = Client(tmp_path / "log", target=dies)
    with pytest.raises(BenchmarkError, match=r"its process ended\n  \| last words"):
        client.ask([], seconds=60)


def test_group_of_processes_ends_with_its_server(tmp_path, monkeypatch):
    """A child that hears no SIGTERM too."""
    script = tmp_path / "server.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "ignore = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);'\n"
        "subprocess.Popen([sys.executable, '-c', ignore + 'print(\"up\", flush=True); time.sleep(60)'])\n"
        "time.sleep(60)\n"
    )
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(vllm_server.sys, "executable", str(fake))
    monkeypatch.setattr(vllm_server, "STOP_SECONDS", 1)
    server = vllm_server.Server(OURS, tmp_path, [], port=1, log=tmp_path / "log")
    end = time.monotonic() + 30
    while "up" not in server.log.read_text() and time.monotonic() < end:
        assert not server.is_ready()
        time.sleep(0.05)
    vllm_server.stop([server])
    assert not server.has_processes()
    with pytest.raises(
        BenchmarkError, match=r"CUSTOM: its server ended with status -15\. The end of its log:\n  \| up"
    ):
        server.is_ready()


def test_cause_is_the_first_error():
    log = (
        "(A) WARNING 11-27 it may fail with OSError: too many files\n(E) ERROR [core.py] ValueError: no such backend\n"
        "(A) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert vllm_server.cause(log) == ": ValueError: no such backend"
    assert vllm_server.cause("Killed\n") == ""


def test_tokenizer_gives_back_the_same_tokens(tmp_path):
    """Which vLLM's client needs for prompts of an exact length; every token has a text."""
    transformers = pytest.importorskip("transformers")
    vllm_server.write_model(tmp_path, TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = random.Random(0).choices(range(2000), k=5000)
    assert tokenizer(tokenizer.decode(tokens), add_special_tokens=False)["input_ids"] == tokens
    assert len(tokenizer) == 2000
    assert all(tokenizer.decode([token]).strip() for token in range(2000))


def test_prompts_of_the_longest_words_are_not_too_long_for_vllm(tmp_path):
    """It compares characters before it counts tokens. A server for n-grams alone refused two prompts of 32 for it."""
    transformers = pytest.importorskip("transformers")
    params = pytest.importorskip("vllm.renderers.params")
    tokenizers = pytest.importorskip("vllm.tokenizers.hf")
    vllm_server.write_model(tmp_path, TINY)
    tokenizer = tokenizers.get_cached_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path))
    prompt = tokenizer.decode([TINY["vocab_size"] - 1] * 1024)
    room = {"max_total_tokens": 1024}
    assert params.TokenizeParams(**room).apply_pre_tokenization(tokenizer, {"prompt": prompt})["prompt"] == prompt
    with pytest.raises(pytest.importorskip("vllm.exceptions").VLLMValidationError, match="context length"):
        params.TokenizeParams(**room).apply_pre_tokenization(tokenizer, {"prompt": prompt * 4})


def test_options_of_servers():
    experiment = Experiment(model=TINY)
    plain = vllm_server.options(OURS, experiment, speculative=False)
    assert value(plain, "--max-model-len") == str(32768 + 512 + 64)
    assert value(plain, "--max-num-seqs") == "32"
    assert '"mode": 0' in value(plain, "--compilation-config")
    assert "--speculative-config" not in plain
    guesses = vllm_server.options(OURS, dataclasses.replace(experiment, compile=True), speculative=True)
    assert '"method": "ngram"' in value(guesses, "--speculative-config")
    assert "--compilation-config" not in guesses


def test_options_of_the_client(tmp_path):
    shared = arguments(serve_cases.WORKLOADS[1], rate=4, seed=7, url="http://a", model=tmp_path)
    assert value(shared, "--dataset-name") == "prefix_repetition"
    lengths = [value(shared, f"--prefix-repetition-{name}") for name in ("prefix-len", "suffix-len", "output-len")]
    assert lengths == ["31744", "1024", "512"]
    plain = arguments(SHORT, rate=math.inf, seed=7, url="http://a", model=tmp_path)
    assert [value(plain, f"--random-{name}") for name in ("input-len", "output-len")] == ["32", "8"]
    assert value(plain, "--request-rate") == "inf"


def test_size_of_the_model():
    """DeepSeek-V2-Lite has 15.7 thousand million weights."""
    assert serve_cases.weight_bytes(MODEL | {"num_hidden_layers": 27}) == pytest.approx(2 * 15.7e9, rel=0.01)


def test_servers_must_fit():
    experiment = Experiment(model=MODEL | {"num_hidden_layers": 20})
    serve_cases.need_room(experiment, 3, 139 << 30)
    with pytest.raises(
        BenchmarkError, match=r"3 servers of 20 layers want about \d+ GiB .* 78 GiB are free"
    ) as refused:
        serve_cases.need_room(experiment, 3, 78 << 30)
    layers = int(str(refused.value).rpartition(" ")[2])
    serve_cases.need_room(serve_cases.with_layers(experiment, layers), 3, 78 << 30)
    with pytest.raises(BenchmarkError, match="fewer backends in --against"):
        serve_cases.need_room(experiment, 3, 9 << 30)


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match="wants vLLM, which is not installed here: pip install"):
        serve.run([OURS], Experiment(model=TINY))


@pytest.mark.parametrize(
    ("options", "helpful"),
    [
        (["--workloads", "1k,2k"], "unknown workload 2k; choose from 1k, 32k, ngram"),
        (["--rates", "4,fast"], "requests a second, such as 4,16,inf; got '4,fast'"),
        (["--rates", "0"], "requests a second, such as 4,16,inf; got '0'"),
        (["--rates", "nan"], "requests a second"),
        (["--against", "FLASHMLA,FOO"], "unknown peer FOO; choose from"),
    ],
)
def test_mistakes_on_the_command_line(options, helpful):
    runner = pytest.importorskip("typer.testing").CliRunner()
    done = runner.invoke(application(), ["bench", "serve", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert helpful in done.output


def test_command(monkeypatch):
    """What it passes on, and what it prints."""
    runner = pytest.importorskip("typer.testing").CliRunner()
    seen = {}

    def run(engines, experiment, **options):
        seen.update(engines=engines, experiment=experiment, **options)
        return [row("CUSTOM", 100, 10)], {"FLASHMLA": "FLASHMLA: its server ended"}

    monkeypatch.setattr(serve, "run", run)
    given = ["--against", "FLASHMLA", "--workloads", "ngram,1k", "--rates", "2,inf", "--layers", "3", "--rounds", "1"]
    done = runner.invoke(application(), ["bench", "serve", *given])
    assert done.exit_code == 0, done.output
    assert seen["engines"] == [OURS, PEER]
    assert [(one.name, one.rates) for one in seen["experiment"].workloads] == [
        ("1k", (2, math.inf)),
        ("ngram", (2, math.inf)),
    ]
    assert (seen["experiment"].model["num_hidden_layers"], seen["rounds"]) == (3, 1)
    assert "left out: FLASHMLA: its server ended" in done.output


def row(backend: str, tokens: float, ms: float, workload: str = "1k") -> dict:
    load = {"vllm": "0", "layers": 1, "workload": workload, "rate": "inf", "prompts": 3, "rounds": 2}
    times = {"output_tokens_per_s": tokens, "ttft_ms": ms, "tpot_ms": ms / 5, "tpot_p99_ms": ms / 2}
    return FACTS | load | {"backend": backend, "tokens_a_check": None} | times


def test_ratios(capsys):
    """More than 1 is a win: more tokens, less time; against the best of the others in each column by itself."""
    rows = [row("FLASHMLA", 90, 8), row("CUSTOM", 100, 10), row("FLASH_ATTN_MLA", 110, 20), row("CUSTOM", 1, 1, "32k")]
    first, second = serve_rows.loads(rows)
    assert [one["backend"] for one in first] == ["CUSTOM", "FLASHMLA", "FLASH_ATTN_MLA"]
    best = serve_rows.against_best(first)
    assert best == pytest.approx({"output_tokens_per_s": 100 / 110, "ttft_ms": 0.8, "tpot_ms": 0.8, "tpot_p99_ms": 0.8})
    assert serve_rows.against_best(second) == {}
    show_serve(rows, {})
    shown = capsys.readouterr().out
    for part in ("90.00 (1.11x)", "8.00 (0.80x)", "20.00 (2.00x)", "ours against the best", "0.91x"):
        assert part in shown


def test_medians_of_rounds():
    answers = [ANSWER | {"median_ttft_ms": ms} for ms in (30, 10, 20)]
    found = serve_rows.values_of(answers)
    assert (found["ttft_ms"], found["tpot_p99_ms"], found["tokens_a_check"]) == (20, 4, None)
