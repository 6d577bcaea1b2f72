"""Rows of `bench serve`: what is kept of the client's answers, and how ours compare. Imports no torch."""

import statistics
from itertools import groupby

OURS = "CUSTOM"  # what vLLM calls our backend
MEASURES = ("output_tokens_per_s", "ttft_ms", "tpot_ms", "tpot_p99_ms")
MORE_IS_BETTER = ("output_tokens_per_s",)
COLUMNS = (
    *("date", "gpu", "torch", "triton", "vllm", "layers", "workload", "rate", "prompts", "rounds", "backend"),
    *MEASURES,
    *("tokens_a_check", "queue_ms", "prefill_ms", "compile"),
)
# Keys of what `vllm bench serve` answers, and of what the server says of its engine. Over the requests of a run, TTFT
# and TPOT are medians: a run has few, and one of them may meet another's long prompt.
ANSWERED = {
    "output_tokens_per_s": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "tokens_a_check": "spec_decode_acceptance_length",
    "queue_ms": "queue_ms",
    "prefill_ms": "prefill_ms",
}


def values_of(answers: list[dict]) -> dict[str, float | None]:
    """The columns that a backend's rounds of one load fill: medians over the rounds, None for what they do not have."""
    columns = {name: [answer.get(key) for answer in answers] for name, key in ANSWERED.items()}
    return {name: None if None in found else round(statistics.median(found), 3) for name, found in columns.items()}


def loads(rows: list[dict]) -> list[list[dict]]:
    """The rows of each workload and rate, ours first."""
    grouped = groupby(rows, key=lambda row: (row["workload"], row["rate"]))
    return [sorted(load, key=lambda row: not row["backend"].startswith(OURS)) for _, load in grouped]


def advantage(measure: str, ours: float, other: float) -> float:
    """How many times better ours is: more than 1 is a win."""
    return ours / other if measure in MORE_IS_BETTER else other / ours


def against_best(load: list[dict]) -> dict[str, float]:
    """For each measure ours, which stands first, against the best of the others; nothing without others."""
    ours, *others = load
    ratios = {name: [advantage(name, ours[name], row[name]) for row in others] for name in MEASURES}
    return {name: min(found) for name, found in ratios.items() if found}


def line(row: dict, throughputs: list[float]) -> str:
    """A row, with the tokens per second of every round."""
    engine = ""  # of a vLLM that counts them by other names
    if None not in (row["queue_ms"], row["prefill_ms"]):
        engine = f" ({row['queue_ms']:.1f} queued, then {row['prefill_ms']:.1f} in the engine)"
    return (
        f"{row['workload']} at {row['rate']}/s, {row['backend']}: "
        f"{', '.join(f'{tokens:.0f}' for tokens in throughputs)} tokens/s, "
        f"TTFT {row['ttft_ms']:.1f} ms{engine}, TPOT {row['tpot_ms']:.2f} ms"
    )
