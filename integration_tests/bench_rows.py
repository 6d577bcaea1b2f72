"""Rows of benchmarks for tests: made up, or measured and committed."""

from pathlib import Path

from mla_backend.bench.prefill_cases import SHAPE, PrefillCase

H200_CSV = Path(__file__).parents[1] / "kernels/benchmarks/results/h200_decode.csv"
FACTS = {"date": "2026-11-22", "gpu": "a GPU", "torch": "2", "triton": "3"}

TINY_MODEL = {  # what differs from the model of `bench engine`, for engines on a CPU
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "vocab_size": 2000,
    "num_hidden_layers": 1,
    "rope_scaling": {  # SGLang on a CPU serves no other
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}


def row(ours: float, case: str = "even", tokens: int = 1024, **times: float) -> dict:
    """A row of 4 requests with our microseconds and those of the peers named."""
    shape = {"case": case, "batch": 4, "tokens": tokens, "heads": 16, "q_len": 1}
    facts = {"cache_dtype": "bf16", "page_size": 64, "limit_us": 1.1, "ours_us": ours}
    return FACTS | shape | facts | {f"{peer}_us": us for peer, us in times.items()}


def prefill_row(case: PrefillCase, ours: float, **times: float) -> dict:
    """A row of the case with our microseconds and those of the peers named."""
    shape = {"case": case.name} | {name: getattr(case, name) for name in SHAPE}
    facts = {"limit_us": round(case.limit_us, 2), "ours_us": ours, "kernel": "ours_best"}
    return FACTS | shape | facts | {f"{peer}_us": us for peer, us in times.items()}
