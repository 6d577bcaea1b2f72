"""The command `mla-backend plan`."""

import dataclasses
import json as json_module
import pathlib
from typing import Annotated

import typer

from mla_backend.bench.commands import fail, need_matplotlib


def table(model, gpus, found, context: int):
    from rich.table import Table

    from mla_backend.plan.estimate import GIB

    made = Table(
        title=f"{model.name}: {model.geometry}; {model.layers} layers with a cache",
        caption=f"{gpus.pool_bytes / GIB:.1f} GiB a GPU for the cache ({gpus.share:g} of {gpus.memory_bytes / GIB:g}, "
        f"less {gpus.weight_bytes / GIB / gpus.tensor_parallel:.1f} of weights), TP {gpus.tensor_parallel}, DCP "
        f"{gpus.context_parallel}. Every tensor-parallel rank holds the whole latent; only DCP divides it. Step: to "
        f"read one request of {context:,} tokens once at {gpus.bytes_per_s / 1e12:g} TB/s.",
    )
    made.add_column("cache", no_wrap=True)
    for name in ("bytes a token", "on a rank", "tokens that fit", f"requests of {context:,}", "GiB of one", "step"):
        made.add_column(name, justify="right")
    for row in found:
        made.add_row(
            row.name,
            f"{row.token_bytes:,}",
            f"{row.rank_bytes:,.0f}",
            f"{row.tokens:,}",
            f"{row.requests:,}",
            f"{row.request_bytes / GIB:.2f}",
            f"{row.step_ms:.2f} ms",
        )
    return made


def plan(
    path: Annotated[pathlib.Path, typer.Argument(metavar="MODEL", help="A config.json, or the folder that holds it.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    dcp: Annotated[int, typer.Option(min=1, help="Decode context parallel ranks, among those of --tp.")] = 1,
    memory: Annotated[float, typer.Option(min=0, max=1e6, metavar="GIB", help="Of one GPU; an H200 has 140.")] = 140,
    share: Annotated[float, typer.Option(min=0, max=1, help="vLLM's --gpu-memory-utilization.")] = 0.92,
    weights: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, metavar="GIB", help="Of the whole model; those beside config.json without it."),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option(min=0.01, metavar="TB/S", help="That a GPU reads; 4.3 was measured on an H200.")
    ] = 4.3,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request.")] = 262144,
    gpu: Annotated[
        str, typer.Option(metavar="ARCH", help="Say which kernels run there: sm_90, sm_80, gfx942, cpu.")
    ] = "sm_90",
    cache: Annotated[
        str, typer.Option(metavar="FORMAT", help="Of the cache there: bf16, fp16, fp32, fp8, fp8_ds_mla.")
    ] = "bf16",
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plot: Annotated[pathlib.Path | None, typer.Option(metavar="FILE.png", dir_okay=False, help="Draw it.")] = None,
) -> None:
    """What a model's cache takes, how much of it fits, and the same for expanded heads. Needs no GPU."""
    if plot:
        need_matplotlib()
    from mla_backend.plan.estimate import GIB, Gpus, rows
    from mla_backend.plan.kernels import PAGE, kernels
    from mla_backend.plan.model import load

    try:
        model = load(path)
        gpus = Gpus(
            tensor_parallel=tp,
            context_parallel=dcp,
            memory_bytes=int(memory * GIB),
            share=share,
            weight_bytes=model.weight_bytes if weights is None else int(weights * GIB),
            bytes_per_s=bandwidth * 1e12,
        )
        found = rows(model, gpus, context)
        chosen = kernels(model, gpu, tp, cache)
    except ValueError as error:
        raise fail(error) from None
    if plot:
        from mla_backend.plan.plot import plot as draw

        draw(model, gpus, found, plot)
    if json:
        parts = {"model": dataclasses.asdict(model), "gpus": dataclasses.asdict(gpus), "context": context}
        parts |= {"rows": [dataclasses.asdict(row) for row in found], "kernels": {"gpu": gpu, "cache": cache, **chosen}}
        typer.echo(json_module.dumps(parts, indent=2))
        return
    from rich.console import Console

    console = Console(width=120, highlight=False)
    console.print(table(model, gpus, found, context))
    console.print(f"On {gpu}, {cache} cache, pages of {PAGE}:")
    for operation, kernel in chosen.items():
        console.print(f"  {operation}: {kernel}")
    if not gpus.weight_bytes:
        console.print("No weights are counted: none lie beside config.json. --weights GIB says how many there are.")
    if gpus.context_parallel > 1:
        console.print("mla_backend takes --decode-context-parallel-size in vLLM, not in SGLang.")
    if model.missing:
        console.print(f"mla_backend does not serve it yet: it needs {model.missing}.")
