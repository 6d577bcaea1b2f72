"""Checkpoints, the oracle's answers, and a way to run vLLM's engine in a process of its own."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

HERE = pathlib.Path(__file__).parent
MAX_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3  # float32 against float32: 5e-5 was seen; a softmax scale 1 % off moves them by 0.05 and more


def kernels_env(kind: str) -> dict[str, str]:
    """Environment that makes every operation take the kernels of one kind, "torch" or "triton"."""
    if kind == "triton":
        return {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return {"TRITON_INTERPRET": "0"}


@dataclass(frozen=True)
class EngineRun:
    """What one engine did: `rounds` of answers, `calls` of our kernels, vLLM's `metrics`, and its `log`."""

    rounds: list
    calls: dict[str, int]
    metrics: dict[str, float]
    log: str


@dataclass(frozen=True)
class FailedRun:
    returncode: int
    log: str


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
    """run(model, rounds, kernels="torch", env={}, fails=False, **llm arguments) -> EngineRun or FailedRun."""

    def run(model, rounds, *, kernels="torch", env=None, fails=False, max_tokens=MAX_TOKENS, timeout=300, **llm):
        spec, result = tmp_path / "spec.json", tmp_path / "result.json"
        spec.write_text(json.dumps({"llm": {"model": str(model), **llm}, "rounds": rounds, "max_tokens": max_tokens}))
        done = subprocess.run(
            [sys.executable, str(HERE / "engine_runner.py"), str(spec), str(result)],
            env={**os.environ, **kernels_env(kernels), **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        log = done.stdout + done.stderr
        if fails:
            assert done.returncode != 0, f"vLLM was expected to refuse, but ran:\n{log[-4000:]}"
            return FailedRun(done.returncode, log)
        assert done.returncode == 0, log[-6000:]
        return EngineRun(**json.loads(result.read_text()), log=log)

    return run


def assert_same_answers(answers, expected) -> None:
    """Tokens equal to the oracle's, and log-probabilities within LOGPROB_TOLERANCE."""
    for i, (got, want) in enumerate(zip(answers, expected, strict=True)):
        context = f"prompt {i}: smallest gap between two logits {want.smallest_gap:.4f}"
        assert got["tokens"] == want.tokens, context
        worst = max(abs(a - b) for a, b in zip(got["logprobs"], want.logprobs, strict=True))
        assert worst < LOGPROB_TOLERANCE, f"{context}; log-probabilities differ by {worst:.2e}"
