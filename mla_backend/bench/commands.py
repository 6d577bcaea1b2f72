"""`mla-backend bench ...`. Imports no torch, no Triton and no engine until a command runs."""

import importlib
import pathlib
from typing import Annotated, Literal

import typer

from mla_backend.bench import prefill_cases
from mla_backend.bench.cases import CASES, chosen_cases
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.results import CPU_PEERS, PEERS

bench = typer.Typer(
    help="Time our kernels and engines beside other people's; measure what a cache format costs a model.",
    no_args_is_help=True,
)


def fail(message: object) -> typer.Exit:
    """Say on one line what is wrong; to be raised, for exit status 1."""
    typer.echo(f"mla-backend: {message}", err=True)
    return typer.Exit(1)


def need_matplotlib() -> None:
    """Before minutes of measuring, not after them."""
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise fail(
            f"a picture needs the package {error.name}, which is not installed: pip install '.[bench]' in a checkout"
        ) from None


def chosen_peers(names: str, known: tuple[str, ...] = PEERS) -> list[str]:
    """Peers of a comma-separated list, in the order of the columns; none for "none". Exits for an unknown one."""
    wanted = {name.strip() for name in names.split(",")} - {"", "none"}
    if unknown := wanted - set(known):
        raise typer.BadParameter(f"unknown peer {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return [peer for peer in known if peer in wanted]


def measured(run, known: tuple, cases: str | None, **options):
    """What `run` gives for the cases of a pattern. Exits when it cannot, or there are none."""
    try:
        chosen = chosen_cases(cases, known)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        return run(chosen, **options)
    except BenchmarkError as error:
        raise fail(error) from None


def peers_option(known: tuple[str, ...]):
    return typer.Option(
        "--against",
        "--peers",
        metavar="NAMES",
        show_default="all",
        help=f"Any of {', '.join(known)}, with commas between; `none` for ours alone.",
    )


DecodeCases = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Only cases whose text has it, such as `b128 .* h16 q1` or `mixed|four`."),
]
DecodeKernel = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Our decode kernel; MLA_BACKEND_DECODE or the best that fits without it."),
]
PageSize = Annotated[int, typer.Option(min=1, help="Tokens of a cache page.")]
Eager = Annotated[
    bool,
    typer.Option("--eager", help="Time calls as the host makes them, its work included, instead of in a CUDA graph."),
]
CSVFile = Annotated[
    pathlib.Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write one row a case, as each ends.")
]
Picture = Annotated[pathlib.Path | None, typer.Option(metavar="FILE.png", dir_okay=False, help="Draw the results.")]


@bench.command()
def decode(
    against: Annotated[str, peers_option(PEERS)] = ",".join(PEERS),
    cases: DecodeCases = None,
    page_size: PageSize = 64,
    cache: Annotated[Literal["bf16", "fp8", "fp8_ds_mla"], typer.Option(help="Format of the cache.")] = "bf16",
    kernel: DecodeKernel = None,
    eager: Eager = False,
    csv: CSVFile = None,
    plot: Picture = None,
) -> None:
    """Time absorbed decode in a CUDA graph, after every case has agreed with float32 attention.

    Kernels that plan on the host (flashinfer_mla) fit no graph and need --eager; peers' plans are made before.
    """
    peers = chosen_peers(against)
    if plot:
        need_matplotlib()
    from mla_backend.bench import decode as benchmark
    from mla_backend.bench import report

    options = {"peers": peers, "page_size": page_size, "cache": cache, "kernel": kernel, "eager": eager, "csv": csv}
    rows, refusals = measured(benchmark.run, CASES, cases, **options)
    report.show(rows, refusals)
    if plot:
        from mla_backend.bench.plot import plot_decode

        plot_decode(rows, plot)


@bench.command()
def prefill(
    against: Annotated[str, peers_option(prefill_cases.PEERS)] = ",".join(prefill_cases.PEERS),
    cases: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only cases whose text has it, such as `h128` or `s8192 h20`.")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Our prefill kernel; MLA_BACKEND_PREFILL or the best that fits without it."),
    ] = None,
    eager: Eager = False,
    csv: CSVFile = None,
    plot: Picture = None,
) -> None:
    """Time prefill attention in a CUDA graph, after every case has agreed with float32 attention.

    Peers get keys concatenated and values contiguous, and what that costs is not in their time. Cases called `step`
    need vLLM: what a layer of its does for a request, and what memory it allocates, ours beside its own with
    FlashAttention-3.

    Kernels that plan on the host (flashinfer_ragged) fit no graph and need --eager; peers' plans are made before.
    """
    peers = chosen_peers(against, prefill_cases.PEERS)
    if plot:
        need_matplotlib()
    from mla_backend.bench import prefill as benchmark
    from mla_backend.bench import report

    options = {"peers": peers, "kernel": kernel, "eager": eager, "csv": csv}
    rows, refusals = measured(benchmark.run, prefill_cases.CASES, cases, **options)
    report.show_prefill(rows, refusals)
    if plot:
        from mla_backend.bench.plot_prefill import plot_prefill

        alone = [row for row in rows if row["case"] == "kernel"]
        if not alone:
            raise fail("--plot draws cases of the kernel alone, and these are steps; leave it out")
        plot_prefill(alone, plot)


@bench.command()
def invariance(
    cases: DecodeCases = None,
    page_size: PageSize = 64,
    kernel: DecodeKernel = None,
) -> None:
    """Time batch-invariant decode beside the ordinary one, after every case has agreed with float32 attention."""
    from mla_backend.bench import invariance as benchmark

    measured(benchmark.run, CASES, cases, page_size=page_size, kernel=kernel)


@bench.command()
def crossover(
    cases: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only cases whose text has it, such as `c16384 h16`.")
    ] = None,
    csv: CSVFile = None,
) -> None:
    """Time new tokens behind cached context in latent space and over expanded heads, after both ways have agreed.

    What a layer does either way, on one GPU, in CUDA graphs. Where the second becomes the faster one stands beside the
    number of tokens at which our rule changes sides.
    """
    from mla_backend.bench import crossover as benchmark
    from mla_backend.bench.report import show_crossover

    rows = measured(benchmark.run, benchmark.CASES, cases, csv=csv)
    show_crossover(rows, benchmark.findings(rows))


@bench.command()
def cpu(
    against: Annotated[str, peers_option(CPU_PEERS)] = ",".join(CPU_PEERS),
    cases: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only cases whose text has it, such as `even b1 ` or `n4 s512`.")
    ] = None,
    csv: CSVFile = None,
) -> None:
    """Time decode and prefill on a CPU beside vLLM's own for CPUs, in bfloat16 and float32.

    Needs vLLM's CPU build. Whatever else runs on the machine is in the times.
    """
    peers = chosen_peers(against, CPU_PEERS)
    from mla_backend.bench import cpu as benchmark

    measured(benchmark.run, benchmark.CASES, cases, peers=peers, csv=csv)


@bench.command()
def plot_decode(csv: pathlib.Path, png: pathlib.Path) -> None:
    """Draw the CSV file of `bench decode` as a picture."""
    need_matplotlib()
    from mla_backend.bench.plot import plot_decode as draw
    from mla_backend.bench.results import read_csv

    try:
        rows = read_csv(csv)
    except (OSError, ValueError) as error:
        raise fail(error) from None
    draw(rows, png)
    typer.echo(str(png))


@bench.command()
def engine(
    host: Annotated[Literal["vllm", "sglang"], typer.Option("--engine", help="Whose engine.")] = "vllm",
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The engine's names of attention backends, with commas between. Ours is CUSTOM in vLLM and "
            "mla_backend in SGLang, with :NAME behind it for one of our decode kernels.",
            show_default="ours and the engine's own for Hopper",
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 8,
    csv: Annotated[pathlib.Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the rows.")] = None,
) -> None:
    """Time decode steps of an engine, a model of DeepSeek-V2-Lite's shape and random weights, a process a backend.

    In vLLM also the captured graph of a step alone: with few layers a step waits for the host.
    """
    from mla_backend.bench import engine as benchmark
    from mla_backend.bench.results import write_csv

    engines = [benchmark.Engine.parse(name) for name in (backends or benchmark.HOSTS[host]).split(",")]
    model = benchmark.MODEL | {"num_hidden_layers": layers}
    try:
        rows = benchmark.run(engines, benchmark.Experiment(model=model, host=host))
    except BenchmarkError as error:
        raise fail(error) from None
    if csv:
        write_csv(rows, csv, benchmark.COLUMNS)
    from rich import print as show

    from mla_backend.bench.report import engine_table

    show(engine_table(rows))
    if all(row["graph_ms"] for row in rows):
        show(engine_table(rows, "graph_ms"))


@bench.command()
def serve(
    against: Annotated[
        str,
        typer.Option(metavar="NAMES", help="vLLM's own backends, with commas between; `none` for ours alone."),
    ] = "FLASH_ATTN_MLA,FLASHMLA",
    workloads: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Any of 1k (1024 tokens in, 1024 out), 32k (32768 in, of which all requests share 31744; 512 out) and "
            "ngram (as 1k, with n-gram speculation).",
        ),
    ] = "1k,32k,ngram",
    rates: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Requests a second, with commas between.", show_default="8,inf; 32k: 4,inf"),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model; DeepSeek-V2-Lite has 27.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="How often each load is repeated.")] = 2,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Let vLLM compile as it does by default; starts take a minute or more longer."),
    ] = False,
    csv: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the rows, as each load ends.")
    ] = None,
    logs: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="Keep there what servers and client print."),
    ] = None,
) -> None:
    """Serve a model with our backend and with vLLM's own, and ask the servers in turn with vLLM's own client.

    Output tokens a second, time to the first token (TTFT) and time per further token (TPOT). Needs vLLM and a GPU that
    holds all servers at once; the model has DeepSeek-V2-Lite's shape and random weights.
    """
    from mla_backend.bench import serve as benchmark
    from mla_backend.bench import serve_cases
    from mla_backend.bench.engine import MODEL, Engine
    from mla_backend.bench.report import show_serve
    from mla_backend.bench.serve_rows import OURS

    peers = chosen_peers(against, serve_cases.PEERS)
    try:
        chosen = serve_cases.chosen_workloads(workloads, rates)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    experiment = serve_cases.Experiment(model=MODEL | {"num_hidden_layers": layers}, workloads=chosen, compile=compile)
    engines = [Engine(backend=name) for name in (OURS, *peers)]
    try:
        rows, refusals = benchmark.run(engines, experiment, rounds=rounds, csv=csv, logs=logs)
    except BenchmarkError as error:
        raise fail(error) from None
    show_serve(rows, refusals)


@bench.command()
def quality(
    model: Annotated[str, typer.Argument(help="A folder, such as examples/train_small_model.py writes, or a name.")],
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Cache formats, with commas between; the first is what others are compared with."
        ),
    ] = "bf16,fp8",
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Lengths of context, with commas between.")
    ] = "512,2048,8192",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    csv: Annotated[pathlib.Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the rows.")] = None,
) -> None:
    """Measure in vLLM what a cache format costs a model: perplexity, greedy agreement, notes found far back."""
    from mla_backend.bench import quality as benchmark
    from mla_backend.bench.results import write_csv

    names = formats.split(",")
    if unknown := set(names) - set(benchmark.FORMATS):
        raise typer.BadParameter(f"unknown format {', '.join(unknown)}; choose from {', '.join(benchmark.FORMATS)}")
    try:
        experiment = benchmark.Experiment(lengths=tuple(map(int, lengths.split(","))), dtype=dtype)
        rows = benchmark.run(model, names, experiment)
    except (BenchmarkError, ValueError) as error:
        raise fail(error) from None
    if csv:
        write_csv(rows, csv, benchmark.COLUMNS)
    from rich import print as show

    from mla_backend.bench.report import quality_table

    show(quality_table(rows))
