"""What the engine's tests share: prompts, one engine run in a process of its own, and how answers are compared."""

import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field

import forked_runs
import torch

HERE = pathlib.Path(__file__).parent
MAX_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3  # float32 against float32: 5e-5 was seen; a softmax scale 1 % off moves them by 0.05 and more


LENGTHS = (2, 17, 64, 65, 131, 450)  # uneven, on both sides of pages and tiles


def prompts(lengths=LENGTHS, seed=0) -> list[list[int]]:
    """Random token ids, one prompt of each length."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 500) for _ in range(n)] for n in lengths]


def varied_rounds(many: int) -> list:
    """One request, `many`, uneven lengths, long and short tails behind prefixes that were cached before, and repetition
    that n-grams are found in."""
    phrase, shared = prompts((9,))[0], prompts((300,))[0]
    return [
        prompts((5,)),
        prompts((1, 300, 17, 64)),
        [shared, *prompts((40,) * 5, seed=2)],
        [shared + tail for tail in prompts((1, 8, 33, 60, 250), seed=3)],
        prompts(tuple(range(2, 2 + many)), seed=4),
        [phrase * 5, phrase[:4] * 8, *prompts((3,) * (many - 5), seed=5)],
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def changed(folder, tmp_path, **config):
    """A copy of a checkpoint with other fields in config.json."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def kernels_env(kind: str) -> dict[str, str]:
    """Environment that makes every operation take the kernels of one kind, "torch" or "triton"."""
    if kind == "triton":
        return {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return {"TRITON_INTERPRET": "0"}


@dataclass(frozen=True)
class EngineRun:
    """What one engine did: `rounds` of answers, `calls` of our kernels, the engine's `metrics`, its `log`, and what
    serving_watch.py saw."""

    rounds: list
    calls: dict[str, int]
    metrics: dict[str, float]
    log: str
    watch: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FailedRun:
    returncode: int
    log: str


def run_engine(
    folder: pathlib.Path,
    model,
    rounds,
    *,
    kernels="torch",
    env=None,
    fails=False,
    max_tokens=MAX_TOKENS,
    invariant_attention=False,
    kimi=False,
    prefill_alone=False,
    **llm,
):
    """Run vLLM (engine_runner.py) with `folder` as its working directory. Returns an EngineRun, or a FailedRun if
    `fails`.

    rounds: batches of prompts (token ids), one after another.   llm: keyword arguments of vllm.LLM.
    invariant_attention: tell our adapter alone that the engine is to be batch invariant.
    kimi: let a CPU run Kimi-Linear (kimi_stand_in.py).
    prefill_alone: leave to vLLM's own layer what it does around a prefill backend, and give it ours.
    """
    spec = {"llm": {"model": str(model), **llm}, "rounds": rounds, "max_tokens": max_tokens}
    spec |= {"invariant_attention": invariant_attention, "kimi": kimi, "prefill_alone": prefill_alone}
    return _run("engine_runner.py", folder, spec, env={**kernels_env(kernels), **(env or {})}, fails=fails)


def run_life(
    place: pathlib.Path,
    model,
    scenario: str,
    *,
    max_tokens=MAX_TOKENS,
    env=None,
    invariant_attention=False,
    llm=None,
    **arguments,
):
    """Run a scenario of life_runner.py, with `place` as its working directory. Returns what it returned, and "log".

    invariant_attention: as for `run_engine`.   llm: keyword arguments of vllm.LLM.   arguments: of the scenario.
    """
    spec = {"llm": {"model": str(model), **(llm or {})}, "max_tokens": max_tokens}
    spec |= {"scenario": scenario, "arguments": arguments, "invariant_attention": invariant_attention}
    code, log = _process("life_runner.py", place, spec, {**kernels_env("torch"), **(env or {})})
    assert code == 0, log[-6000:]
    return {**json.loads((place / "result.json").read_text()), "log": log}


def run_sglang(
    folder: pathlib.Path, model, rounds, *, kernels="torch", env=None, fails=False, max_tokens=MAX_TOKENS, **engine
):
    """As `run_engine`, with SGLang (sglang_runner.py).   engine: keyword arguments of sglang.Engine."""
    spec = {"engine": {"model_path": str(model), **engine}, "rounds": rounds, "max_tokens": max_tokens}
    return _run("sglang_runner.py", folder, spec, env={**kernels_env(kernels), **(env or {})}, fails=fails)


def _run(script: str, folder: pathlib.Path, spec: dict, *, env: dict[str, str], fails: bool):
    code, log = _process(script, folder, spec, env)
    if fails:
        assert code != 0, f"the engine was expected to refuse, but ran:\n{log[-4000:]}"
        return FailedRun(code, log)
    assert code == 0, log[-6000:]
    return EngineRun(**json.loads((folder / "result.json").read_text()), log=log)


def _process(script: str, folder: pathlib.Path, spec: dict, env: dict[str, str]) -> tuple[int, str]:
    """Exit status and log of a runner, which writes result.json into `folder`."""
    (folder / "spec.json").write_text(json.dumps(spec))
    if not script.startswith("sglang"):
        run = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {script[:-3]} as it; it.main(*sys.argv[1:])"
        code, *output = forked_runs.python(run, "spec.json", "result.json", folder=folder, **env)
        return code, "".join(output)
    done = subprocess.run(
        [sys.executable, str(HERE / script), "spec.json", "result.json"],
        env={**os.environ, **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    return done.returncode, done.stdout + done.stderr


def assert_near_ties_apart(answers, expected, *, near_tie: float) -> list[int]:
    """Each answer has the oracle's tokens, at least until its two best logits are closer than `near_tie`. Returns how
    many tokens of each are the same."""
    same = []
    for i, (got, want) in enumerate(zip(answers, expected, strict=True)):
        pairs = zip(got["tokens"], want.tokens, strict=True)
        first = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        cached = f"{got.get('cached')} tokens of its prompt were cached"
        assert first is None or want.gaps[first] < near_tie, f"answer {i}, token {first}: {want.gaps}; {cached}"
        same.append(len(want.tokens) if first is None else first)
    return same


def assert_same_answers(answers, expected, *, tolerance: float = LOGPROB_TOLERANCE) -> None:
    """Tokens equal to the oracle's, and log-probabilities within `tolerance`."""
    for i, (got, want) in enumerate(zip(answers, expected, strict=True)):
        context = f"prompt {i}: smallest gap between two logits {want.smallest_gap:.4f}"
        assert got["tokens"] == want.tokens, context
        worst = max(abs(a - b) for a, b in zip(got["logprobs"], want.logprobs, strict=True))
        assert worst < tolerance, f"{context}; log-probabilities differ by {worst:.2e}"
