"""What batch invariance costs: decode in fixed splits beside the ordinary one, `mla-backend bench invariance`.

Both run on the same inputs in one process; the answers in fixed splits are compared with float32 attention first.
"""

from mla_backend.bench.cases import Case
from mla_backend.bench.compare import config_for
from mla_backend.bench.decode import DTYPE, attention_for, make_inputs, ours, verify
from mla_backend.bench.machine import machine, need_gpu
from mla_backend.bench.results import geometric_mean
from mla_backend.bench.timing import graph_us, input_sets
from mla_kernels import format_of


def measure(case: Case, config, *, page_size: int) -> dict:
    """One row: microseconds of either mode, their ratio, and tokens of a split."""
    count = input_sets(case.cache_bytes(format_of(DTYPE).name))
    sets = [make_inputs(case, page_size=page_size, dtype=DTYPE, seed=seed) for seed in range(count)]
    ordinary, invariant = (attention_for(sets[0], config, batch_invariant=mode) for mode in (False, True))
    ordinary_us, invariant_us = (graph_us([ours(one, data) for data in sets]) for one in (ordinary, invariant))
    return {
        "case": str(case),
        "kernel": invariant.chosen["decode"].kernel.name,
        "split_tokens": invariant.problem.split_tokens,
        "ordinary_us": round(ordinary_us, 2),
        "invariant_us": round(invariant_us, 2),
        "ratio": round(invariant_us / ordinary_us, 3),
    }


def run(cases, *, page_size: int = 64, kernel: str | None = None) -> list[dict]:
    """Check and time all cases, and print a line as each ends. Raises BenchmarkError for a wrong answer."""
    need_gpu()
    config, rows = config_for("decode", kernel), []
    print(" ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    for case in cases:
        verify(case, config, page_size=page_size, dtype=DTYPE, batch_invariant=True)
        rows.append(measure(case, config, page_size=page_size))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    ratios = [row["ratio"] for row in rows]
    print(f"invariant over ordinary: {geometric_mean(ratios):.2f} in geometric mean, {max(ratios):.2f} at worst")
    return rows
