"""Serve a small MLA model with vLLM and our kernels, and show that it answers as Hugging Face transformers does.

    make demo

Makes a DeepSeek-V2-shaped checkpoint with random weights (nothing is downloaded), generates with transformers, then
with vLLM's own engine and `attention_backend="CUSTOM"`, and compares. Uses the GPU where there is one, vLLM's CPU
build elsewhere. Exit status 0 only if tokens and log-probabilities agree and every attention operation ran on a kernel
of ours.
"""

import contextlib
import os
import pathlib
import sys
import time
from importlib.metadata import version

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the calls of our kernels can be counted
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling vLLM's router helpers takes longer than the demo

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

PROMPTS = (
    "Attention lets every token",
    "The cache still grows by one row for every token that is read or written, so",
    "def add(a, b):",
    "How many tokens fit? " * 12,
)
NEW_TOKENS = 24
FOLDER = pathlib.Path(os.environ.get("MLA_DEMO_FOLDER", "models/demo"))
# float32 on both sides. On a GPU, vLLM's mixture-of-experts kernel multiplies in TF32, which has 10 bits of mantissa.
LOGPROB_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
OPERATIONS = ("cache_write", "prefill", "decode")

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


def serve(folder, prompts: list[list[int]], device: str):
    """Greedy continuations by vLLM: [(tokens, log-probabilities)]."""
    from vllm import LLM, SamplingParams

    memory = {} if device == "cuda" else {"kv_cache_memory_bytes": 64 << 20}
    llm = LLM(
        model=str(folder),
        attention_backend="CUSTOM",
        dtype="float32",
        max_model_len=1024,
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


def compare(tokenizer, expected, answers, tolerance: float) -> bool:
    """Print what was generated beside what transformers generated. Returns whether they agree."""
    table = Table("prompt", "vLLM with mla_backend continues", "tokens equal", "logprobs differ by")
    good = True
    for prompt, want, (tokens, logprobs) in zip(PROMPTS, expected, answers, strict=True):
        equal = sum(a == b for a, b in zip(tokens, want.tokens, strict=True))
        worst = max(abs(a - b) for a, b in zip(logprobs, want.logprobs, strict=True))
        good &= equal == len(tokens) and worst < tolerance
        short = prompt if len(prompt) < 40 else prompt[:37] + "..."
        table.add_row(short, repr(tokenizer.decode(tokens)), f"{equal} of {len(tokens)}", f"{worst:.1e}")
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
    from tiny_checkpoint import make_checkpoint
    from transformers import AutoTokenizer
    from transformers_oracle import generate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, vLLM's CPU build"
    step(f"mla_backend {version('mla-backend')}, vLLM {version('vllm')}, torch {torch.__version__}, on {where}")
    log = FOLDER.with_name(FOLDER.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with waiting("transformers makes a checkpoint and answers ..."), output_to(log):
        folder = make_checkpoint(FOLDER)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
        expected = generate(folder, prompts, NEW_TOKENS)
    step(f"checkpoint with random weights in {FOLDER}; transformers has answered {len(prompts)} prompts")
    with waiting(f"vLLM loads and answers ... (its log: {log})"), output_to(log):
        answers = serve(folder, prompts, device)
    step(f"vLLM has answered (its log: {log})")
    console.print(our_start_up_line(log), markup=False)
    same = compare(tokenizer, expected, answers, LOGPROB_TOLERANCE[device])
    ours = count_calls()
    if same and ours:
        console.print(
            "[bold green]equal[/]: the tokens of transformers, "
            f"log-probabilities within {LOGPROB_TOLERANCE[device]:g}, all attention by our kernels"
        )
        return 0
    console.print(f"[bold red]{'not equal' if not same else 'some attention was not done by our kernels'}[/]")
    return 1


BEGAN = time.perf_counter()
if __name__ == "__main__":
    sys.exit(main())
