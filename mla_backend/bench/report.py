"""Benchmarks' rows as tables. Needs rich."""

import shutil
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from mla_backend.bench import prefill_cases, serve_rows
from mla_backend.bench.results import (
    BEST,
    PEERS,
    Summary,
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
    numbers = ("limit", "ours", "GB/s", "TFLOP/s", "of limit", *PEERS, f"{BEST} / ours")
    table = _table("Absorbed decode", rows, numbers)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def prefill_table(rows: list[dict]) -> Table:
    """As case_table. Rates are ours."""
    peers = prefill_cases.PEERS
    numbers = ("limit", "ours", "TFLOP/s", "of limit", *peers, f"{BEST} / ours")
    free = f" {' and '.join(peers)} get keys concatenated and values contiguous: what that costs is in steps alone."
    table = _table("Prefill attention, bf16,", rows, numbers, free)
    for row in rows:
        ours, case = row["ours_us"], prefill_cases.case_of(row)
        rates = (f"{prefill_cases.teraflops(row, ours):.0f}", f"{case.limit_us / ours:.0%}")
        table.add_row(str(case), f"{row['limit_us']:.1f}", f"{ours:.1f}", *rates, *_against(row, peers))
    return table


def _table(what: str, rows: list[dict], numbers: tuple[str, ...], note: str = "") -> Table:
    """Without rows: the machine above it, what numbers mean below it."""
    first = rows[0]
    kernels = ", ".join(dict.fromkeys(row["kernel"] for row in rows if "kernel" in row))
    table = Table(
        title=f"{what} on {first['gpu']}, {first['date']}, torch {first['torch']}, Triton {first['triton']}",
        caption="Microseconds a call. x: the time over ours, more than 1 is a win for us."
        + (" Calls as the host makes them, its work included." if first.get("eager") else "")
        + note
        + (f" Ours: {kernels}." if kernels else ""),
    )
    table.add_column("case", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _against(row: dict, peers: tuple[str, ...]) -> list[str]:
    """The peers' times, and the best one's over ours."""
    times, best = peer_times(row), best_ratio(row)
    shown = [f"{times[peer]:.1f}" if peer in times else NOTHING for peer in peers]
    return [*shown, f"{best:.2f}x" if best else NOTHING]


def _cells(row: dict) -> list[str]:
    ours = row["ours_us"]
    return [
        str(case_of(row)),
        f"{row['limit_us']:.1f}",
        f"{ours:.1f}",
        f"{gigabytes_per_s(row, ours):.0f}",
        f"{teraflops(row, ours):.1f}",
        f"{fraction_of_limit(row):.0%}",
        *_against(row, PEERS),
    ]


def crossover_table(rows: list[dict]) -> Table:
    """Both ways' times."""
    numbers = ("new tokens", "latent", "expanded", "expanded / latent")
    table = _table("Attention of new tokens behind cached context", rows, numbers)
    table.caption = f"Microseconds of a layer. x: more than 1 where latent space wins. Ours: {rows[0]['kernel']}."
    for row in rows:
        latent, expanded = row["latent_us"], row["expanded_us"]
        times = f"{latent:.1f}", f"{expanded:.1f}", f"{expanded / latent:.2f}x"
        table.add_row(f"h{row['heads']} c{row['context']}", f"{row['tokens']}", *times)
    return table


def show_crossover(rows: list[dict], findings: Iterable[str]) -> None:
    console = Console(width=max(150, shutil.get_terminal_size().columns), highlight=False)
    console.print(crossover_table(rows))
    for finding in findings:
        console.print(finding, markup=False)


def summary_table(made: list[Summary]) -> Table:
    table = Table(title="Time of each peer over ours")
    table.add_column("peer", no_wrap=True)
    for name in ("cases", "geometric mean", "worst"):
        table.add_column(name, justify="right")
    table.add_column("in case", no_wrap=True)
    for one in made:
        end = one.peer == BEST
        if end:
            table.add_section()
        table.add_row(one.peer, str(one.count), f"{one.mean:.2f}x", f"{one.worst:.2f}x", one.worst_case)
    return table


def show(rows: list[dict], refusals: dict[tuple[str, str], list[str]]) -> None:
    """Print the tables of decode, then why cells are empty: `refusals` has the cases of each (peer, reason)."""
    _show(case_table(rows), summaries(rows), refusals)


def show_prefill(rows: list[dict], refusals: dict[tuple[str, str], list[str]]) -> None:
    """As `show`. Peers' times are summed up over kernels alone: steps are of another kind, and few."""
    alone = [row for row in rows if row["case"] == "kernel"]
    _show(prefill_table(rows), summaries(alone, prefill_cases.case_of), refusals)


def _show(table: Table, made: list[Summary], refusals: dict[tuple[str, str], list[str]]) -> None:
    # rich cuts numbers where a terminal is narrow, and takes 80 columns for a file.
    console = Console(width=max(150, shutil.get_terminal_size().columns), highlight=False)
    console.print(table)
    if made:
        console.print(summary_table(made))
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


def serve_table(rows: list[dict]) -> Table:
    """A row for each load and backend; behind a peer's numbers how many times better ours are."""
    first = rows[0]
    table = Table(
        title=f"vllm serve on {first['gpu']}, {first['date']}, vLLM {first['vllm']}, {first['layers']} layers",
        caption="TTFT and TPOT: medians over requests, then over rounds. x: ours against it, more than 1 is a win."
        " Below a load ours against the best other of each column.",
    )
    for name in ("workload", "requests/s", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "TTFT ms", "TPOT ms", "p99 TPOT ms", "tokens a check"):
        table.add_column(name, justify="right", no_wrap=True)
    for load in serve_rows.loads(rows):
        for row in load:
            cells = [_beside(load[0], row, name) for name in serve_rows.MEASURES]
            table.add_row(row["workload"], row["rate"], row["backend"], *cells, _shown(row["tokens_a_check"]))
        if best := serve_rows.against_best(load):
            table.add_row("", "", "ours against the best", *(f"{best[name]:.2f}x" for name in serve_rows.MEASURES))
        table.add_section()
    return table


def _shown(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _beside(ours: dict, row: dict, name: str) -> str:
    value = _shown(row[name])
    return value if row is ours else f"{value} ({serve_rows.advantage(name, ours[name], row[name]):.2f}x)"


def show_serve(rows: list[dict], refusals: dict[str, str]) -> None:
    """Print the table, then why a backend is not in it, or not everywhere."""
    console = Console(width=max(150, shutil.get_terminal_size().columns), highlight=False)
    console.print(serve_table(rows))
    for reason in refusals.values():
        console.print(f"left out: {reason}", markup=False)


def quality_table(rows: list[dict]) -> Table:
    """A row each; what was not measured is a dash."""
    first = rows[0]["format"]
    table = Table(
        title="What a cache format costs", caption=f"Agreement of greedy continuations with those of {first}."
    )
    for name in ("format", "tokens", "perplexity", "agreement", "needle"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for row in rows:
        needle = NOTHING if row["needle"] is None else f"{row['needle']:.1%}"
        cells = f"{row['tokens']}", f"{row['perplexity']:.4f}", f"{row['agreement']:.1%}", needle
        table.add_row(row["format"], *cells)
    return table
