"""A picture of decode rows: the roofline, and below it every case's times over the limit. Needs matplotlib."""

import itertools
import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mla_backend.bench.cases import BYTES_PER_US, FLOP_PER_US
from mla_backend.bench.results import PEERS, case_of, intensity, teraflops

INCHES_WIDE, DPI = 9.0, 200  # 1800 pixels, shown at half of that in a README
ROOFLINE_INCHES, CASE_INCHES, REST_INCHES = 4.0, 0.22, 1.3
SERIES = ("ours", *PEERS)
# Okabe and Ito's colours, which people with a colour-vision deficiency can tell apart; markers tell them apart in grey.
# Ours is a ring, so that a peer which is level stays visible inside it.
STYLE = {
    "ours": {"edgecolors": "#D55E00", "marker": "o", "label": "ours", "s": 56, "facecolors": "none", "linewidths": 1.8},
    "flashmla": {"color": "#0072B2", "marker": "s", "label": "FlashMLA", "s": 20, "linewidths": 0},
    "fa3": {"color": "#009E73", "marker": "^", "label": "FlashAttention-3", "s": 26, "linewidths": 0},
    "flashinfer": {"color": "#CC79A7", "marker": "D", "label": "FlashInfer", "s": 18, "linewidths": 0},
    "vllm_triton": {"color": "#555555", "marker": "x", "label": "vLLM TRITON_MLA", "s": 22, "linewidths": 1.4},
}
ASIDE = 1.09  # many cases share an intensity: series stand side by side there, this factor apart
LIFT = {"flashmla": -0.13, "fa3": 0.13}  # of a line: peers that are level would hide one another
BAND, GRID, QUIET = "#F1F1F1", "#DDDDDD", "#888888"
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def plot_decode(rows: list[dict], png: pathlib.Path) -> None:
    """Write the picture of a run's rows, or of those that `results.read_csv` gives."""
    cases_inches = CASE_INCHES * len(rows) + 0.6
    figure = Figure(figsize=(INCHES_WIDE, ROOFLINE_INCHES + cases_inches + REST_INCHES), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(ROOFLINE_INCHES, cases_inches))
    draw_roofline(above, rows)
    draw_cases(below, rows)
    first = rows[0]
    figure.suptitle(
        f"Absorbed MLA decode on {first['gpu']}: {first['cache_dtype']} cache, pages of {first['page_size']} tokens\n"
        f"{first['date']}, torch {first['torch']}, Triton {first['triton']}",
        fontsize=11,
    )
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(SERIES), frameon=False, columnspacing=1.4)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")


def times(rows: list[dict], series: str) -> list[tuple[dict, float]]:
    """(row, microseconds) where the series has a time."""
    return [(row, row[f"{series}_us"]) for row in rows if row.get(f"{series}_us")]


def draw_roofline(axes: Axes, rows: list[dict]) -> None:
    """TFLOP/s over FLOP for each cache byte, under what the memory and the matrix units allow."""
    found = sorted({intensity(row) for row in rows})
    present = [series for series in SERIES if times(rows, series)]
    draw_ceilings(axes, found, ASIDE ** (len(present) / 2))
    for place, series in enumerate(present):
        aside = ASIDE ** (place - (len(present) - 1) / 2)
        pairs = times(rows, series)
        x = [intensity(row) * aside for row, _ in pairs]
        axes.scatter(x, [teraflops(row, us) for row, us in pairs], zorder=4, **STYLE[series])
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("FLOP per byte of cache; inside a band, all have the value below it and the limit at the bar")
    axes.set_xticks(found, [f"{value:.0f}" for value in found])
    axes.set_ylim(top=2 * FLOP_PER_US / 1e6)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PLAIN)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_ceilings(axes: Axes, found: list[float], half_band: float) -> None:
    """Both ceilings, and at each intensity a band (this factor to either side) with a bar at its limit: a point beside
    its true place must not be read against a slope."""
    ridge, rate, peak = FLOP_PER_US / BYTES_PER_US, BYTES_PER_US / 1e6, FLOP_PER_US / 1e6
    left, right = min(found[0], ridge / 2) / 1.6, max(found[-1], ridge) * 1.6
    axes.plot([left, ridge, right], [left * rate, peak, peak], color=QUIET, linewidth=1, zorder=2)
    for value in found:
        axes.axvspan(value / half_band, value * half_band, color=BAND, zorder=0)
        axes.hlines(min(value * rate, peak), value / half_band, value * half_band, color="black", linewidth=2, zorder=3)
    label = {"textcoords": "offset points", "fontsize": 9, "va": "bottom"}
    axes.annotate(f"{rate:g} TB/s", (ridge / 2, ridge / 2 * rate), (-8, 8), ha="right", **label)
    axes.annotate(f"{peak:g} TFLOP/s", (right, peak), (-6, 4), ha="right", **label)
    axes.set(xlim=(left, right))


def case_label(row: dict) -> str:
    """One line in columns, for a monospaced font."""
    case = case_of(row)
    what = f"{case.batch:>3} x {case.tokens:>6}" if case.name == "even" else f"{case.name:>12}"
    return f"{what}  h{case.heads:<3} q{case.query_len}"


def draw_cases(axes: Axes, rows: list[dict]) -> None:
    """A line for each case, from few FLOP for each byte to many: every series' time over the limit."""
    ordered = sorted(rows, key=lambda row: (intensity(row), case_of(row).total_tokens))
    place = {id(row): number for number, row in enumerate(ordered)}
    for series in SERIES:
        pairs = times(ordered, series)
        if pairs:
            ratios = [us / case_of(row).limit_us(row["cache_dtype"]) for row, us in pairs]
            y = [place[id(row)] + LIFT.get(series, 0) for row, _ in pairs]
            axes.scatter(ratios, y, zorder=4, **STYLE[series])
    for number, (before, after) in enumerate(itertools.pairwise(ordered)):
        if intensity(before) != intensity(after):
            axes.axhline(number + 0.5, color=QUIET, linewidth=0.6)
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set(xscale="log", ylim=(len(ordered) - 0.5, -0.5))
    axes.set_xlim(left=0.9)
    axes.set_xticks([1, 1.5, 2, 3, 5, 10, 20, 50, 100])
    axes.xaxis.set_major_formatter(PLAIN)
    axes.minorticks_off()
    axes.set_yticks(range(len(ordered)), [case_label(row) for row in ordered], family="monospace", fontsize=8)
    axes.set_xlabel("time over the limit (1 = memory or matrix units fully used)")
    axes.set_ylabel("requests x tokens, heads, query tokens")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
