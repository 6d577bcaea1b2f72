"""`bench engine --engine sglang` with the real engine: on a CPU its times mean nothing, but everything else does."""

import pytest
from bench_rows import TINY_MODEL

pytest.importorskip("sglang")

from mla_backend.bench import engine

EXPERIMENT = engine.Experiment(model=engine.MODEL | TINY_MODEL, host="sglang", workloads=((2, 200), (1, 300)))
pytestmark = pytest.mark.usefixtures("no_gpu_needed")


def test_steps_of_a_real_engine(capfd):
    rows = engine.run([engine.Engine.parse("mla_backend:torch_decode")], EXPERIMENT, rounds=1)
    assert "decode torch_decode" in capfd.readouterr().err
    assert [(row["requests"], row["tokens"], row["backend"]) for row in rows] == [
        (2, 200, "mla_backend:torch_decode"),
        (1, 300, "mla_backend:torch_decode"),
    ]
    assert all(row["engine"].startswith("SGLang 0.5.") and 0.1 < row["step_ms"] < 1000 for row in rows)
