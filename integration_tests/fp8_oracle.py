"""What Hugging Face transformers answers if its cache rounds as an fp8 cache does: an oracle for engines with one.

transformers caches what MLA caches, the latent and one rotary key of each token, in one place that a test can change.
Not every release does; MLA_TEST_ORACLE_PYTHON names the Python to ask (such as "python3 -E") where an engine's own
environment has another.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers_oracle import Generation, load

# Of log-probabilities. Engines and transformers differ in the last bits of float32, so some values round to the other
# side: 0.03 was seen. A cache that does not round at all is off by 0.4 and more, and gives other tokens.
FP8_TOLERANCE = 0.1
# With a model in bfloat16 many more values round to the other side: transformers itself, given the tokens of its
# float32 answer, moves their log-probabilities by up to 0.39 and the gap to the second best by up to 0.90 (one dense
# layer, six prompts; without an fp8 cache 0.17 and 0.30).
FP8_BFLOAT16_NEAR_TIE = 0.39


def per_tensor(latent, rope):
    """e4m3 values with a scale of 1."""
    return tuple(x.to(torch.float8_e4m3fn).float() for x in (latent, rope))


def tile_scaled(latent, rope):
    """fp8_ds_mla: e4m3 values of the latent with a power of two for each 128 as scale, and bfloat16 of the rest."""
    tiles = latent.unflatten(-1, (-1, 128))
    scale = (tiles.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-4).log2().ceil().exp2()
    return ((tiles / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2), rope.bfloat16().float()


class Fp8Cache(DynamicCache):
    """Holds what `rounded` makes of latents and rotary keys. Tokens that come together see each other as they are, if
    they are many; one alone, or few in latent space, are read back from the cache."""

    def __init__(self, most_in_latent_space: int, rounded):
        super().__init__()
        self._most, self._rounded = most_in_latent_space, rounded

    def update(self, latent, rope, layer, *args, **kwargs):
        if rope.shape[1] != 1:
            pytest.skip(f"transformers {transformers.__version__} caches expanded keys, 5.17.0 and 5.19.0 the latent")
        held = super().update(*self._rounded(latent, rope), layer, *args, **kwargs)
        new = latent.shape[-2]
        if new <= self._most:
            return held
        return tuple(torch.cat([old[..., :-new, :], x], -2) for old, x in zip(held, (latent, rope), strict=True))


ASK, HERE = "MLA_TEST_ORACLE_PYTHON", pathlib.Path(__file__).parent
TELL = "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); import fp8_oracle; fp8_oracle.tell()"


def generate_fp8(
    folder, prompts, max_tokens: int, *, pieces=None, most_in_latent_space: int = 1, rounded=per_tensor
) -> list[Generation]:
    """Greedy continuation of each prompt, in float32.

    pieces: lengths of the parts in which a prompt is prefilled, the last one open; whole without.
    most_in_latent_space: tokens of a part that is attended to in latent space, so through the cache.
    rounded: what the cache makes of values.
    """
    question = [str(folder), prompts, max_tokens, pieces, most_in_latent_space, rounded.__name__]
    if python := os.environ.get(ASK):
        command = [*shlex.split(python), "-c", TELL, json.dumps([str(HERE), str(HERE.parent / "examples")])]
        told = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr[-3000:]
        return [Generation(**answer) for answer in json.loads(told.stdout.splitlines()[-1])]
    return _generate(*question)


@torch.inference_mode()
def _generate(folder, prompts, max_tokens, pieces, most_in_latent_space, rounded) -> list[Generation]:
    rounded = {"per_tensor": per_tensor, "tile_scaled": tile_scaled}[rounded]
    model, answers = load(folder, torch.float32), []
    for prompt in prompts:
        cache, parts, rest = Fp8Cache(most_in_latent_space, rounded), [], list(prompt)
        for length in pieces or ():
            parts, rest = [*parts, rest[:length]], rest[length:]
        answers.append(_continue(model, cache, [part for part in (*parts, rest) if part], max_tokens))
    return answers


def _continue(model, cache, parts: list[list[int]], max_tokens: int) -> Generation:
    answer = Generation(tokens=[], logprobs=[], gaps=[])
    for part in parts:
        logits = model(torch.tensor([part]), past_key_values=cache).logits[0, -1]
    while True:
        best = logits.topk(2)
        answer.tokens.append(int(best.indices[0]))
        answer.logprobs.append(float(logits.log_softmax(-1)[best.indices[0]]))
        answer.gaps.append(float(best.values[0] - best.values[1]))
        if len(answer.tokens) == max_tokens:
            return answer
        logits = model(torch.tensor([answer.tokens[-1:]]), past_key_values=cache).logits[0, -1]


def tell() -> None:
    """What another process asks for."""
    print(json.dumps([asdict(answer) for answer in _generate(*json.load(sys.stdin))]))
