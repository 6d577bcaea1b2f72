"""What a user of SGLang's server does: `sglang serve --attention-backend mla_backend`, asked with an OpenAI client."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import free_port, prompts

pytest.importorskip("sglang")
openai = pytest.importorskip("openai")

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
CONTEXT, TOKENS, START_SECONDS = 512, 12, 240
SMALL = ["--device", "cpu", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--dtype", "float32"]
SMALL += ["--max-total-tokens", "4096", "--context-length", str(CONTEXT)]


def environment(**more) -> dict[str, str]:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **local, "PATH": path, **more}


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints()


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """An OpenAI client of a running server, which ends in peace with the tests."""
    port, log = free_port(), tmp_path_factory.mktemp("sglang") / "log"
    command = [shutil.which("sglang", path=environment()["PATH"]), "serve", "--model-path", str(folder)]
    command += ["--attention-backend", "mla_backend", "--served-model-name", "tiny", *SMALL]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment(), stdout=out, stderr=out
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    end = time.monotonic() + START_SECONDS
    while True:
        assert server.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, "the server does not answer"
        try:
            client.models.list()
            break
        except openai.APIConnectionError:
            time.sleep(0.5)
    yield client
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def text_of(folder, oracle):
    """text_of(prompt) -> how transformers continues a prompt of token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda prompt: tokenizer.decode(oracle(folder, [prompt], TOKENS)[0].tokens)


def complete(client, prompt, **options):
    return client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=TOKENS, **options)


def test_many_at_once(client, text_of):
    batch = prompts((5, 33, 64, 65, 130, 200), seed=4)
    with ThreadPoolExecutor(len(batch)) as threads:
        answers = list(threads.map(lambda prompt: complete(client, prompt).choices[0].text, batch))
    assert answers == [text_of(prompt) for prompt in batch]


def test_stream(client, text_of):
    (prompt,) = prompts((40,), seed=5)
    parts = [chunk.choices[0].text for chunk in complete(client, prompt, stream=True) if chunk.choices]
    assert len(parts) > 1
    assert "".join(parts) == text_of(prompt)


def test_client_that_goes_away(client, text_of):
    (prompt,) = prompts((65,), seed=6)
    stream = client.completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert complete(client, prompt).choices[0].text == text_of(prompt)


def test_prompt_that_is_too_long(client, text_of):
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)):
        complete(client, prompts((CONTEXT + 1,))[0])
    (prompt,) = prompts((9,))
    assert complete(client, prompt).choices[0].text == text_of(prompt)


def run(example: str, *arguments, **env) -> tuple[int, str]:
    command = [str(EXAMPLES / example)] if example.endswith(".sh") else [sys.executable, str(EXAMPLES / example)]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment(**env), capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_offline_example(folder):
    status, shown = run("sglang_offline.py", folder)
    assert status == 0, shown[-4000:]
    assert "mla_backend 0" in shown
    assert len(re.findall(r"""' -> (['"]).+\1$""", shown, re.MULTILINE)) == 3


def test_serve_example(folder, oracle):
    from transformers import AutoTokenizer

    status, shown = run("sglang_serve.sh", folder, *SMALL, PORT=str(free_port()))
    assert status == 0, shown[-4000:]
    reply = json.loads(next(line for line in shown.splitlines() if line.startswith('{"id"')))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("Attention lets every token")["input_ids"]
    assert reply["choices"][0]["text"] == tokenizer.decode(oracle(folder, [asked], 24)[0].tokens)
    assert "The server has stopped.\n" in shown


def test_serve_example_without_a_server():
    status, shown = run("serve_and_ask.sh", "false", PORT=str(free_port()))
    assert status == 1
    assert "The server ended before it was ready" in shown
