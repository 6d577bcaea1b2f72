"""Serve a small MLA model with vLLM and our kernels, and show that it answers as Hugging Face transformers does.

    make demo

The model is examples/small_model, DeepSeek-V3's architecture trained on Python source (nothing is downloaded). It goes
on with code, one piece of it from a file that it has never seen, and repeats a note that stands far back there: first
with transformers, then with vLLM's own engine and `attention_backend="CUSTOM"`. Uses the GPU where there is one, vLLM's
CPU build elsewhere. Exit status 0 only if tokens and log-probabilities agree, the note is found, and every attention
operation ran on a kernel of ours.
"""

import contextlib
import os
import pathlib
import random
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the calls of our kernels can be counted
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling vLLM's router helpers takes longer than the demo

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mla_backend.bench.quality_tasks import KEY, MARKER, VALUE, Notes, text_of

MODEL = pathlib.Path(__file__).with_name("small_model")
LOG = pathlib.Path("models/demo.log")
CODE = (
    "def __init__(self, name, value=None):\n        self.",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.",
)
UNSEEN, UNTIL = "bz2.py", "def writable("  # a file of the standard library that training left out, and where we cut it
NEW_TOKENS = 32
# float32 on both sides. On a GPU libraries may multiply in TF32, which has 10 bits of mantissa.
LOGPROB_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
OPERATIONS = ("cache_write", "cache_gather", "prefill", "decode")

# A copy of standard output, because vLLM's own log goes to a file.
console = Console(
    file=os.fdopen(os.dup(1), "w", buffering=1), highlight=False, width=None if sys.stdout.isatty() else 130
)


@contextlib.contextmanager
def output_to(path: pathlib.Path):
    """Send what this process prints, in C++ too, to a file; show its end if something goes wrong."""
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush()
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except BaseException:
        console.print(path.read_text(errors="replace")[-4000:], markup=False)
        raise
    finally:
        sys.stdout.flush()
        for descriptor, original in enumerate(kept, start=1):
            os.dup2(original, descriptor)
            os.close(original)


def waiting(text: str) -> Live:
    """A spinner that leaves standard output alone: rich would otherwise take it from `output_to` on a terminal."""
    return Live(Spinner("dots", text), console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def our_start_up_line(log: pathlib.Path) -> str:
    """The line of vLLM's log in which this package says what runs and why."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "mla_backend 0" in line]
    return lines[0].partition("] ")[2] if lines else "(this package said nothing in vLLM's log)"


def step(text: str) -> None:
    console.print(f"[bold cyan]{time.perf_counter() - BEGAN:5.1f} s[/]  {text}")


@dataclass(frozen=True)
class Prompt:
    name: str
    tokens: list[int]


def make_prompts(tokenizer) -> tuple[list[Prompt], list[int]]:
    """Code to go on with, and last the question for a note; and what that note says."""
    text = text_of(UNSEEN).partition(UNTIL)[0] + UNTIL
    code = [Prompt(piece, tokenizer(piece)["input_ids"]) for piece in CODE]
    unseen = Prompt(f"{UNSEEN} up to\n{UNTIL}", tokenizer(text)["input_ids"])
    words = [token for token in range(len(tokenizer)) if re.fullmatch(" [a-z]{3,}", tokenizer.decode([token]))]
    distance = len(unseen.tokens) - 100
    note = Notes(tokenizer.get_vocab()[MARKER], words).recall(unseen.tokens, distance, random.Random(0))
    asked = Prompt(f"note {distance} tokens back:\n{tokenizer.decode(note.prompt[-KEY:])}", note.prompt)
    return [*code, unseen, asked], note.answer


def serve(prompts: list[list[int]], device: str):
    """Greedy continuations by vLLM: [(tokens, log-probabilities)]."""
    from vllm import LLM, SamplingParams

    memory = {} if device == "cuda" else {"kv_cache_memory_bytes": 64 << 20}
    llm = LLM(
        model=str(MODEL),
        attention_backend="CUSTOM",
        dtype="float32",
        max_model_len=4096,
        max_num_batched_tokens=512,  # so that long prompts come in chunks, which read the cache
        max_num_seqs=8,
        enforce_eager=True,
        **memory,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    answers = [a.outputs[0] for a in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)]
    return [
        (list(a.token_ids), [at[token].logprob for at, token in zip(a.logprobs, a.token_ids, strict=True)])
        for a in answers
    ]


def compare(tokenizer, prompts: list[Prompt], expected, answers, tolerance: float) -> bool:
    """Print what was generated beside how far transformers' answer is from it. Returns whether they agree."""
    table = Table("prompt", "vLLM with mla_backend continues", "tokens equal", "logprobs differ by", show_lines=True)
    table.columns[1].overflow = "fold"
    good = True
    for prompt, want, (tokens, logprobs) in zip(prompts, expected, answers, strict=True):
        equal = sum(a == b for a, b in zip(tokens, want.tokens, strict=True))
        worst = max(abs(a - b) for a, b in zip(logprobs, want.logprobs, strict=True))
        good &= equal == len(tokens) and worst < tolerance
        row = prompt.name, tokenizer.decode(tokens), f"{equal} of {len(tokens)}", f"{worst:.1e}"
        table.add_row(*map(Text, row))
    console.print(table)
    return good


def count_calls() -> bool:
    """Print how often each of our kernels was called. Returns whether all that this demo needs were."""
    from mla_backend.attention import CALLS

    table = Table("operation", "kernel", "calls")
    for (operation, kernel), count in sorted(CALLS.items()):
        table.add_row(operation.replace("_", " "), kernel, str(count))
    console.print(table)
    return {operation for operation, _ in CALLS} >= set(OPERATIONS)


def main() -> int:
    step("loading torch, transformers and vLLM ...")
    import torch
    from transformers import AutoTokenizer
    from transformers_oracle import generate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, vLLM's CPU build"
    step(f"mla_backend {version('mla-backend')}, vLLM {version('vllm')}, torch {torch.__version__}, on {where}")
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with waiting("transformers answers ..."), output_to(LOG):
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        prompts, note = make_prompts(tokenizer)
        expected = generate(MODEL, [prompt.tokens for prompt in prompts], NEW_TOKENS)
    step(f"transformers has answered {len(prompts)} prompts")
    with waiting(f"vLLM loads and answers ... (its log: {LOG})"), output_to(LOG):
        answers = serve([prompt.tokens for prompt in prompts], device)
    step(f"vLLM has answered (its log: {LOG})")
    console.print(our_start_up_line(LOG), markup=False)
    tolerance = LOGPROB_TOLERANCE[device]
    checks = {
        "not equal to transformers": compare(tokenizer, prompts, expected, answers, tolerance),
        "the note was not found": answers[-1][0][:VALUE] == note,
        "some attention was not done by our kernels": count_calls(),
    }
    if failed := [what for what, good in checks.items() if not good]:
        console.print(f"[bold red]{'; '.join(failed)}[/]")
        return 1
    console.print(
        f"[bold green]equal[/]: the tokens of transformers, log-probabilities within {tolerance:g}, "
        "all attention by our kernels; the note was found"
    )
    return 0


BEGAN = time.perf_counter()
if __name__ == "__main__":
    sys.exit(main())
