"""Every file of examples/ as a user runs it: it ends with status 0 and shows what it is there to show."""

import contextlib
import json
import os
import pathlib
import pty
import re
import socket
import subprocess
import sys

import pytest
from harness import free_port

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
PROMPT = "Attention lets every token"  # the one that vllm_serve.sh asks
SMALL = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20))


def run(example: str, *arguments, cwd, fails=False, **environment) -> str:
    """What an example prints, run in a folder of the test with this Python's programs in front."""
    quick = {"TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}  # compiling helpers takes longer than their work
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    done = subprocess.run(
        [*([sys.executable] if example.endswith(".py") else []), str(EXAMPLES / example), *map(str, arguments)],
        env={**os.environ, "PATH": path, **quick, **environment},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(checkpoints):
    return checkpoints()


@pytest.fixture(scope="module")
def answer(model, oracle):
    """How transformers continues PROMPT."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.decode(oracle(model, [tokenizer(PROMPT)["input_ids"]], 24)[0].tokens)


def test_all_are_listed_and_tested():
    files = (pathlib.Path(__file__).with_name(name) for name in ("test_examples.py", "test_sglang_serve.py"))
    readme, tests = (EXAMPLES / "README.md").read_text(), "".join(file.read_text() for file in files)
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".sh"):
            assert f"| `{path.name}` |" in readme
            assert f'("{path.name}"' in tests


def run_on_a_terminal(example: str, *, cwd, **environment) -> str:
    """What an example shows on a wide terminal: programs such as rich behave differently there."""
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / example)],
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb", **environment},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=its_end,
        stderr=its_end,
    )
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an input/output error
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    text = shown.decode(errors="replace")
    assert process.wait(timeout=60) == 0, text[-6000:]
    return text


def test_demo(tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("rich")
    shown = run_on_a_terminal("demo.py", cwd=tmp_path)
    assert "equal: the tokens of transformers, log-probabilities within" in shown
    assert "mla_backend 0.1.0: decode" in shown
    assert "INFO" not in shown, "vLLM's log belongs into a file"
    assert shown.count("32 of 32") == 4
    assert "whether the file" in shown, "code that reads like the file's own"
    for operation in ("cache write", "cache gather", "prefill", "decode"):
        assert re.search(rf"{operation}\W+(torch|triton)_\w+\W+[1-9]", shown), shown


def test_offline(tmp_path):
    pytest.importorskip("vllm")
    shown = run("vllm_offline.py", cwd=tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert "mla_backend 0" in shown
    answers = re.findall(r"""' -> (['"]).+\1$""", shown, re.MULTILINE)  # repr takes the quote that the text lacks
    assert len(answers) == 3
    assert (tmp_path / "models/tiny/config.json").exists()


@pytest.fixture(scope="module")
def answers_of(model, oracle):
    """answers_of(prompts, tokens) -> how transformers continues them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def answers(prompts, tokens):
        return [tokenizer.decode(a.tokens) for a in oracle(model, [tokenizer(p)["input_ids"] for p in prompts], tokens)]

    return answers


def test_speculative(tmp_path, model, answers_of):
    """Guesses are made and checked, and change no answer."""
    pytest.importorskip("vllm")
    from speculative import PROMPTS

    options = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    shown = run("speculative.py", model, "--new", 12, "--dtype", "float32", cwd=tmp_path, **options)
    for prompt, answer in zip(PROMPTS, answers_of(PROMPTS, 12), strict=True):
        assert f"{prompt!r} -> {answer!r}" in shown
    guessed, checks = map(int, re.search(r"(\d+) tokens guessed in (\d+) steps of a request, ", shown).groups())
    assert guessed >= checks > 0


def test_two_ranks(tmp_path, model, answers_of):
    """Without GPUs two processes, each with half of the heads and the whole cache."""
    pytest.importorskip("vllm")
    from two_gpus import PROMPTS

    shown = run("two_gpus.py", model, "--dtype", "float32", cwd=tmp_path)
    for prompt, answer in zip(PROMPTS, answers_of(PROMPTS, 24), strict=True):
        assert f"{prompt!r} -> {answer!r}" in shown
    said = [line for line in shown.splitlines() if "mla_backend 0" in line]
    assert len(said) == 2, "each rank says it"
    assert all("2 heads, latent 512" in line for line in said)
    assert "room for 58,240 cached tokens" in shown, "256 MiB of pages of 64 tokens, 2 layers of 2304 bytes a token"


def test_long_context(tmp_path):
    """From the second turn on all but the new tokens, and what is left of a page, comes from the cache."""
    pytest.importorskip("vllm")
    sizes = ("--context", 700, "--turns", 3, "--turn", 20, "--answer", 8)
    shown = run("long_context_256k.py", *sizes, cwd=tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    rows = [row for row in map(str.split, shown.splitlines()) if len(row) == 5 and row[0].isdigit()]
    assert [row[:3] for row in rows] == [["1", "636", "0"], ["2", "664", "640"], ["3", "692", "640"]]
    assert all(float(row[3]) > 0 < float(row[4]) for row in rows)
    refused = run("long_context_256k.py", "--context", 100, cwd=tmp_path, fails=True)
    assert "--context must be more than 6144, what the turns take; got 100" in refused


def test_serve(tmp_path, model, answer):
    pytest.importorskip("vllm")
    port = free_port()
    shown = run("vllm_serve.sh", model, "--dtype", "float32", *SMALL, cwd=tmp_path, PORT=str(port))
    reply = json.loads(next(line for line in shown.splitlines() if line.startswith('{"id"')))
    assert reply["choices"][0]["text"] == answer
    assert "mla_backend 0" in shown
    assert "The server has stopped.\n" in shown
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_serve_says_that_the_server_did_not_start(tmp_path):
    """Played by a `vllm` that ends at once."""
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    (tmp_path / "vllm").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    port = str(free_port())
    shown = run("vllm_serve.sh", "m", "--seed", "1", cwd=tmp_path, fails=True, PORT=port, PATH=path)
    assert shown.startswith("serve m --attention-backend CUSTOM")
    assert f"--seed 1 --host 127.0.0.1 --port {port}\nThe server ended before it was ready" in shown
    assert "usage: examples/vllm_serve.sh MODEL" in run("vllm_serve.sh", cwd=tmp_path, fails=True)


def test_kernels_without_an_engine(tmp_path):
    shown = run("kernels_only.py", cwd=tmp_path, TRITON_INTERPRET="0")
    assert "equal to the reference" in shown
    table = {row[0]: row[1:] for row in map(str.split, shown.splitlines()) if len(row) == 4}
    # DeepSeek-V3: 512 + 64 values of 2 bytes a token and layer, or 128, 8 or 1 heads of 192 + 128; 61 layers.
    assert table["MLA"] == ["1,152", "70,272", "15,232"]
    assert table["MHA"] == ["81,920", "4,997,120", "214"]
    assert table["GQA-8"][0] == "5,120"
    assert table["MQA"][0] == "640"
    assert "still grows linearly" in shown


def test_tiny_checkpoint(tmp_path):
    shown = run("tiny_checkpoint.py", "models/v3", "--arch", "v3", "--q-lora-rank", "96", cwd=tmp_path)
    assert shown.strip().endswith(str(tmp_path / "models/v3"))
    config = json.loads((tmp_path / "models/v3/config.json").read_text())
    assert (config["model_type"], config["q_lora_rank"]) == ("deepseek_v3", 96)


def test_train_small_model(tmp_path):
    small = ("--minutes", "0.1", "--tokens-a-step", "512", "--longest", "512", "--files", "60")
    from safetensors.torch import load_file

    shown = run("train_small_model.py", "models/small", *small, cwd=tmp_path)
    assert re.search(r"\d% +step [1-9]\d* .* tokens of 512  loss \d", shown), shown
    assert re.search(r"512 tokens: perplexity \d+\.\d+, \d of 8 notes found", shown), shown
    for folder in (tmp_path / "models/small", EXAMPLES / "small_model"):
        assert sum(file.stat().st_size for file in folder.iterdir()) < 6_000_000
        tensors = load_file(folder / "model.safetensors")
        assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"]), "vLLM wants both"


def test_transformers_oracle(tmp_path, model, answer):
    shown = run("transformers_oracle.py", model, PROMPT, "--device", "cpu", cwd=tmp_path)
    assert f"{PROMPT!r} -> {answer!r}" in shown
