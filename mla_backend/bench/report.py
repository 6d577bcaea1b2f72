"""A decode benchmark's rows as tables. Needs rich."""

import shutil

from rich.console import Console
from rich.table import Table

from mla_backend.bench.results import (
    BEST,
    PEERS,
    best_ratio,
    case_of,
    fraction_of_limit,
    gigabytes_per_s,
    peer_times,
    summaries,
    teraflops,
)

NOTHING = "-"


def case_table(rows: list[dict]) -> Table:
    """All cases; a column for each peer, with a dash where it has no time."""
    first = rows[0]
    kernels = ", ".join(dict.fromkeys(row["kernel"] for row in rows if "kernel" in row))
    table = Table(
        title=f"Absorbed decode on {first['gpu']}, {first['date']}, torch {first['torch']}, Triton {first['triton']}",
        caption="Microseconds a call. x: the time over ours, more than 1 is a win for us."
        + (f" Ours: {kernels}." if kernels else ""),
    )
    table.add_column("case", no_wrap=True)
    numbers = ("limit", "ours", "GB/s", "TFLOP/s", "of limit", *PEERS, f"{BEST} / ours")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict) -> list[str]:
    ours, times, best = row["ours_us"], peer_times(row), best_ratio(row)
    return [
        str(case_of(row)),
        f"{row['limit_us']:.1f}",
        f"{ours:.1f}",
        f"{gigabytes_per_s(row, ours):.0f}",
        f"{teraflops(row, ours):.1f}",
        f"{fraction_of_limit(row):.0%}",
        *(f"{times[peer]:.1f}" if peer in times else NOTHING for peer in PEERS),
        f"{best:.2f}x" if best else NOTHING,
    ]


def summary_table(rows: list[dict]) -> Table:
    table = Table(title="Time of each peer over ours")
    table.add_column("peer", no_wrap=True)
    for name in ("cases", "geometric mean", "worst"):
        table.add_column(name, justify="right")
    table.add_column("in case", no_wrap=True)
    for one in summaries(rows):
        end = one.peer == BEST
        if end:
            table.add_section()
        table.add_row(one.peer, str(one.count), f"{one.mean:.2f}x", f"{one.worst:.2f}x", one.worst_case)
    return table


def show(rows: list[dict], refusals: dict[tuple[str, str], list[str]]) -> None:
    """Print the tables, then why cells are empty: `refusals` has the cases of each (peer, reason)."""
    # rich cuts numbers where a terminal is narrow, and takes 80 columns for a file.
    console = Console(width=max(150, shutil.get_terminal_size().columns), highlight=False)
    console.print(case_table(rows))
    if summaries(rows):
        console.print(summary_table(rows))
    for (peer, reason), cases in refusals.items():
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        console.print(f"no {peer} ({cases[0]}{more}): {reason}", markup=False)


def engine_table(rows: list[dict], what: str = "step_ms") -> Table:
    """Milliseconds of each backend, and its time over the first one's.   what: "step_ms" or "graph_ms"."""
    first = rows[0]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    name = "Decode steps" if what == "step_ms" else "Graphs of decode steps, without the host's work,"
    table = Table(
        title=f"{name} on {first['gpu']}, {first['date']}, {first['engine']}, {first['layers']} layers",
        caption=f"Milliseconds. x: the time over that of {backends[0]}, more than 1 is a win for it.",
    )
    table.add_column("requests x tokens", no_wrap=True)
    for name in backends:
        table.add_column(name, justify="right", no_wrap=True)
    times = {(row["requests"], row["tokens"], row["backend"]): row[what] for row in rows}
    for requests, tokens in dict.fromkeys((row["requests"], row["tokens"]) for row in rows):
        ms = [times[requests, tokens, name] for name in backends]
        table.add_row(f"{requests} x {tokens}", f"{ms[0]:.3f}", *(f"{t:.3f} ({t / ms[0]:.2f}x)" for t in ms[1:]))
    return table
