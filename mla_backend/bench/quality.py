"""What a cache format costs a model, through vLLM's own engine: `mla-backend bench quality`.

One process a format, one after another; prompts go through in chunks, so that nearly all that a token attends to is
read back from the cache. A row is a format and a length of context:

perplexity   of held-out texts of that length
agreement    share of a greedy continuation that comes before the first token which another format chose: the first one
             measured, which is the model's own
needle       share of notes, that far back, whose value is continued without a mistake; None where a model's tokenizer
             has no <note>, so was not taught the task
"""

import itertools
import math
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.quality_tasks import MARKER, Notes, Recall, pieces, texts
from mla_backend.config import set_environment

FORMATS = {"bf16": "auto", "fp8": "fp8", "fp8_ds_mla": "fp8_ds_mla"}  # and vLLM's --kv-cache-dtype
COLUMNS = ("format", "tokens", "perplexity", "agreement", "needle")
CHUNK = 256  # tokens of a prompt that go through together; they see one another before the cache has rounded them


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What every format does.   texts: of each length.   recalls: of each length, if the model knows notes."""

    lengths: tuple[int, ...] = (512, 2048, 8192)
    texts: int = 16
    recalls: int = 64
    new_tokens: int = 128
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Tasks:
    texts: list[list[int]]
    recalls: list[Recall]


@dataclass(frozen=True)
class Outcome:
    """Of one format and length."""

    perplexity: float
    continuations: list[list[int]]
    needle: float | None


def make_tasks(tokenizer, experiment: Experiment) -> dict[int, Tasks]:
    """By length. Raises ValueError where the standard library is too short for them."""
    ids = (tokenizer(text, verbose=False)["input_ids"] for text in texts(held_out=True))
    longest = max(experiment.lengths)
    stream = list(itertools.islice(itertools.chain.from_iterable(ids), longest * max(experiment.texts, 64)))
    marker = tokenizer.get_vocab().get(MARKER)
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    notes = Notes(marker, words) if marker is not None else None
    return {length: _tasks(stream, notes, length, experiment) for length in experiment.lengths}


def _tasks(stream: list[int], notes: Notes | None, length: int, experiment: Experiment) -> Tasks:
    rng = random.Random(length)
    around = pieces(stream, length, experiment.recalls) if notes else []
    asked = [notes.recall(text, length - length // 8, rng) for text in around]
    return Tasks(pieces(stream, length, experiment.texts), asked)


def measure(model: str, kv_cache_dtype: str, experiment: Experiment) -> dict[int, Outcome]:
    """Start vLLM with our backend in this process, and do all tasks: outcomes by length."""
    set_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM

    llm = LLM(
        model=model,
        dtype=experiment.dtype,
        kv_cache_dtype=kv_cache_dtype,
        attention_backend="CUSTOM",
        max_model_len=max(experiment.lengths) + experiment.new_tokens,
        max_num_seqs=16,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        gpu_memory_utilization=0.02,  # says nothing beside those bytes, but vLLM refuses to start where less is free
    )
    return {
        length: _outcome(llm, tasks, experiment)
        for length, tasks in make_tasks(llm.get_tokenizer(), experiment).items()
    }


def _outcome(llm, tasks: Tasks, experiment: Experiment) -> Outcome:
    answers = (
        _generate(llm, [one.prompt for one in tasks.recalls], len(tasks.recalls[0].answer)) if tasks.recalls else []
    )
    right = [got == one.answer for got, one in zip(answers, tasks.recalls, strict=True)]
    return Outcome(
        perplexity=_perplexity(llm, tasks.texts),
        continuations=_generate(llm, tasks.texts, experiment.new_tokens),
        needle=sum(right) / len(right) if right else None,
    )


def _generate(llm, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def _perplexity(llm, prompts: list[list[int]]) -> float:
    """Of every token after the first."""
    from vllm import SamplingParams

    scored = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], scored, use_tqdm=False)
    logprobs = [
        at[token].logprob
        for answer in answers
        for at, token in zip(answer.prompt_logprobs[1:], answer.prompt_token_ids[1:], strict=True)
    ]
    return math.exp(-sum(logprobs) / len(logprobs))


def agreement(continuations: list[list[int]], original: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    equal = sum(
        len(list(itertools.takewhile(lambda two: two[0] == two[1], zip(mine, theirs, strict=True))))
        for mine, theirs in zip(continuations, original, strict=True)
    )
    return equal / sum(map(len, original))


def run(model: str, formats: list[str], experiment: Experiment) -> list[dict]:
    """Rows of COLUMNS; the first format is the one that others are compared with.

    Raises BenchmarkError when an engine does not start or ends.
    """
    rows, original = [], None
    for name in formats:
        outcomes = _in_own_process(name, model, experiment)
        original = original or outcomes
        for length, outcome in outcomes.items():
            row = {"format": name, "tokens": length, "perplexity": round(outcome.perplexity, 4)}
            row["agreement"] = round(agreement(outcome.continuations, original[length].continuations), 4)
            row["needle"] = outcome.needle if outcome.needle is None else round(outcome.needle, 4)
            rows.append(row)
    return rows


def _in_own_process(name: str, model: str, experiment: Experiment) -> dict[int, Outcome]:
    """A process for each, so that memory and settings of one engine are gone before the next."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, model, FORMATS[name], experiment).result()
        except Exception as error:
            raise BenchmarkError(f"{name}: {type(error).__name__}: {error!s:.600}") from error
