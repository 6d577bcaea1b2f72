"""A picture of cache size over context length. Needs matplotlib."""

import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mla_backend.plan.estimate import GIB, Gpus, Row
from mla_backend.plan.model import Model

LENGTHS = tuple(1024 * 2**i for i in range(11))  # 1 Ki to 1 Mi tokens
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito's
DASHES = ("-", "-", "-", ":")  # MQA lies on GQA where no rank has more than one head of either


def plot(model: Model, gpus: Gpus, found: list[Row], png: pathlib.Path) -> None:
    """GiB of one request on a rank, for the first latent format and expanded heads, beside what a rank has."""
    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes = figure.subplots()
    shown = [found[0], *(row for row in found if not row.name.startswith("MLA"))]
    for row, colour, dashes in zip(shown, COLOURS, DASHES, strict=True):
        gib = [length * row.rank_bytes / GIB for length in LENGTHS]
        axes.plot(LENGTHS, gib, color=colour, linestyle=dashes, label=row.name)
    if gpus.pool_bytes:
        axes.axhline(gpus.pool_bytes / GIB, color="#888888", linestyle="--", label="what a GPU has for it")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g} Ki"))
    axes.set_xlabel("tokens of one request")
    axes.set_ylabel(f"GiB on a GPU, TP {gpus.tensor_parallel}, DCP {gpus.context_parallel}")
    axes.set_title(f"{model.name}\n{model.geometry}; {model.layers} layers", fontsize=10)
    axes.grid(color="#DDDDDD")
    axes.legend(frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")
