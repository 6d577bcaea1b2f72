"""Fixtures of the integration tests; what they are made of is in harness.py."""

import functools
import os

# Test processes share the cores already, and several threads for tensors as small as these wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from bench_rows import FACTS
from harness import MAX_TOKENS, run_engine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """make(**shape) -> folder of a tiny checkpoint; made once for each shape, also among parallel test processes."""
    from tiny_checkpoint import make_checkpoint

    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent

    @functools.cache
    def make(**shape):
        name = "-".join(f"{key}{value}" for key, value in sorted(shape.items())) or "default"
        return make_checkpoint(root / "checkpoints" / name, **shape)

    return make


@pytest.fixture(scope="session")
def oracle():
    """answers(folder, prompts) -> what transformers generates, in float32."""
    from transformers_oracle import generate

    remembered = {}

    def answers(folder, prompts, max_tokens=MAX_TOKENS):
        missing = [p for p in prompts if (folder, tuple(p), max_tokens) not in remembered]
        for prompt, answer in zip(missing, generate(folder, missing, max_tokens), strict=True):
            remembered[folder, tuple(prompt), max_tokens] = answer
        return [remembered[folder, tuple(p), max_tokens] for p in prompts]

    return answers


@pytest.fixture
def engine(tmp_path):
    """run(model, rounds, ...) as harness.run_engine, in a folder of the test."""
    return functools.partial(run_engine, tmp_path)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """`bench engine` on this machine, as if its facts were those of bench_rows.py."""
    from mla_backend.bench import engine

    monkeypatch.setattr(engine, "need_gpu", lambda: None)
    monkeypatch.setattr(engine, "machine", lambda: FACTS)
