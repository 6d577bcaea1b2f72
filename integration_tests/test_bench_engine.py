"""`bench engine` with a real engine: on a CPU its times mean nothing, but everything else does."""

import os
import time
from types import SimpleNamespace

import pytest
from bench_rows import FACTS, TINY_MODEL

pytest.importorskip("vllm")

from mla_backend.bench import engine, vllm_engine
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.report import engine_table
from mla_backend.bench.results import write_csv

EXPERIMENT = engine.Experiment(model=engine.MODEL | TINY_MODEL, workloads=((2, 64), (1, 128)))
pytestmark = pytest.mark.usefixtures("no_gpu_needed")


def test_names_of_engines():
    assert engine.Engine.parse(" FLASHMLA ") == engine.Engine(backend="FLASHMLA")
    ours = engine.Engine.parse("CUSTOM:gluon_sm90")
    assert ours == engine.Engine(backend="CUSTOM", environment=(("MLA_BACKEND_DECODE", "gluon_sm90"),))
    assert str(ours) == "CUSTOM:gluon_sm90"


def test_steps_of_a_real_engine(tmp_path, capfd):
    rows = engine.run([engine.Engine.parse("CUSTOM:torch_decode")], EXPERIMENT)
    assert "decode torch_decode" in capfd.readouterr().out
    assert [(row["requests"], row["tokens"], row["backend"]) for row in rows] == [
        (2, 64, "CUSTOM:torch_decode"),
        (1, 128, "CUSTOM:torch_decode"),
    ]
    assert all(0.1 < row["step_ms"] < 1000 and row["graph_ms"] is None for row in rows)
    write_csv(rows, tmp_path / "steps.csv", engine.COLUMNS)
    header, first, _ = (tmp_path / "steps.csv").read_text().splitlines()
    assert header == "date,gpu,torch,triton,engine,backend,layers,requests,tokens,step_ms,graph_ms"
    assert first.startswith("2026-11-22,a GPU,2,3,vLLM ")
    assert first.endswith(",")


def test_engine_that_does_not_start(capfd):
    with pytest.raises(BenchmarkError, match=r"CUSTOM:no_such_kernel: .*unknown decode kernel 'no_such_kernel'"):
        engine.run([engine.Engine.parse("CUSTOM:no_such_kernel")], EXPERIMENT)


def dies(connection, folder, engine, experiment):
    """A worker that the system ends, at once or when it is asked."""
    if engine.backend == "LATER":
        connection.send("0")
        connection.recv()
    os._exit(3)


def sleeps(connection, folder, engine, experiment):
    if engine.backend == "SLOW":
        time.sleep(60)
    os._exit(3)


@pytest.mark.parametrize("when", ["AT_ONCE", "LATER"])
def test_a_process_that_dies_is_reported(when):
    with pytest.raises(BenchmarkError, match=f"{when}: its process ended with status 3"):
        engine.run([engine.Engine.parse(when)], EXPERIMENT, target=dies)


def test_a_process_that_dies_is_not_waited_for_behind_a_slow_one():
    begin = time.monotonic()
    with pytest.raises(BenchmarkError, match="BROKEN: its process ended"):
        engine.run([engine.Engine.parse("SLOW"), engine.Engine.parse("BROKEN")], EXPERIMENT, target=sleeps)
    assert time.monotonic() - begin < 45


def test_the_cache_holds_the_largest_workload():
    layers = engine.MODEL | {"num_hidden_layers": 27}
    assert engine.Experiment(model=layers).cache_bytes > 64 * (8192 + engine.STEPS) * 1152 * 27


def test_requests_that_did_not_run_together_are_no_measurement():
    """As when the cache is too small for all of them."""
    unfinished = iter([True] * engine.STEPS + [False])
    small = SimpleNamespace(
        add_request=lambda *_: None, has_unfinished_requests=lambda: next(unfinished), step=lambda: ["one"]
    )
    llm = SimpleNamespace(llm_engine=small, generate=lambda *_, **__: None)
    with pytest.raises(BenchmarkError, match="2 requests were to run together"):
        vllm_engine.time_step(llm, EXPERIMENT, 2, 64)


def test_table():
    def row(backend, tokens, ms):
        return FACTS | {
            "engine": "vLLM 0",
            "backend": backend,
            "layers": 1,
            "requests": 2,
            "tokens": tokens,
            "step_ms": ms,
            "graph_ms": ms / 2,
        }

    rows = [row("CUSTOM", 64, 2.0), row("FLASHMLA", 64, 3.0), row("CUSTOM", 8, 1), row("FLASHMLA", 8, 1)]
    table = engine_table(rows)
    assert list(engine_table(rows, "graph_ms").columns[1].cells) == ["1.000", "0.500"]
    assert [list(column.cells) for column in table.columns] == [
        ["2 x 64", "2 x 8"],
        ["2.000", "1.000"],
        ["3.000 (1.50x)", "1.000 (1.00x)"],
    ]
