"""A picture of prefill rows: TFLOP/s of each case, a panel for each shape of heads. Needs matplotlib."""

import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla_backend.bench.cases import FLOP_PER_US
from mla_backend.bench.plot import DPI, GRID, INCHES_WIDE, QUIET, STYLE, times
from mla_backend.bench.prefill_cases import PEERS, case_of, teraflops

SERIES = ("ours", *PEERS)
HIGH = 4.6  # inches


def plot_prefill(rows: list[dict], png: pathlib.Path) -> None:
    """Write the picture of a run's rows."""
    panels = panels_of(rows)
    figure = Figure(figsize=(INCHES_WIDE, HIGH), dpi=DPI, layout="constrained")
    widths = [len(panel) + 1 for panel in panels]
    (all_axes,) = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)
    for axes, panel in zip(all_axes, panels, strict=True):
        draw(axes, panel)
    all_axes[0].set(ylabel="TFLOP/s", ylim=(0, 1.04 * FLOP_PER_US / 1e6))
    first = rows[0]
    figure.suptitle(
        f"MLA prefill attention on {first['gpu']}, bf16\n"
        f"{first['date']}, torch {first['torch']}, Triton {first['triton']}",
        fontsize=11,
    )
    all_axes[0].set_xlabel("sequences x tokens; bars: the limit", fontsize=9)
    handles = {handle.get_label(): handle for axes in all_axes for handle in axes.collections}
    shown = [label for label in (STYLE[series]["label"] for series in SERIES) if label in handles]
    figure.legend([handles[label] for label in shown], shown, loc="outside lower center", ncols=3, frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")


def panels_of(rows: list[dict]) -> list[list[dict]]:
    """Rows of equal heads and widths together, from short sequences to long ones, those over cached tokens last."""
    panels: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["context"], row["tokens"])):
        panels.setdefault((row["qk_dim"], row["heads"], row["v_dim"]), []).append(row)
    return [panels[shape] for shape in sorted(panels)]


def case_label(row: dict) -> str:
    text = f"{row['count']} x {row['tokens']}"
    return text + (f"\nover {row['context']}" if row["context"] else "")


def draw(axes: Axes, rows: list[dict]) -> None:
    """All of one panel: rows side by side, every series' rate, and the limit's."""
    place = {id(row): number for number, row in enumerate(rows)}
    for number, row in enumerate(rows):
        axes.hlines(teraflops(row, case_of(row).limit_us), number - 0.3, number + 0.3, color="black", linewidth=2)
    for series in SERIES:
        pairs = times(rows, series)
        if pairs:
            x, y = [place[id(row)] for row, _ in pairs], [teraflops(row, us) for row, us in pairs]
            axes.scatter(x, y, zorder=4, **STYLE[series])
    first = rows[0]
    axes.set_title(f"{first['heads']} heads\n{first['qk_dim']} / {first['v_dim']}", fontsize=10)
    axes.set(xlim=(-0.6, len(rows) - 0.4))
    axes.set_xticks(range(len(rows)), [case_label(row) for row in rows], fontsize=8, rotation=45, ha="right")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_color(QUIET)
    axes.set_axisbelow(True)
