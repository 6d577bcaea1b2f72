"""Rows of a decode benchmark for tests: made up, or measured and committed."""

from pathlib import Path

H200_CSV = Path(__file__).parents[1] / "kernels/benchmarks/results/h200_decode.csv"
FACTS = {"date": "2026-11-22", "gpu": "a GPU", "torch": "2", "triton": "3"}


def row(ours: float, case: str = "even", tokens: int = 1024, **times: float) -> dict:
    """A row of 4 requests with our microseconds and those of the peers named."""
    shape = {"case": case, "batch": 4, "tokens": tokens, "heads": 16, "q_len": 1}
    facts = {"cache_dtype": "bf16", "page_size": 64, "limit_us": 1.1, "ours_us": ours}
    return FACTS | shape | facts | {f"{peer}_us": us for peer, us in times.items()}
