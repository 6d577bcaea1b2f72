"""What the benchmarks of kernels share: compare with float32 attention, time beside peers, refuse what is wrong."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from mla_backend.attention import MLAAttention
from mla_backend.bench.machine import BenchmarkError, machine, need_gpu
from mla_backend.bench.results import write_csv
from mla_backend.bench.timing import call_us, graph_us
from mla_backend.config import MLABackendConfig
from mla_kernels import OPERATIONS, UnsupportedMLA
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

PEER_ERROR = 2e-2  # of the norm; the peers' own errors in bf16 are ten times smaller
PEER_ERROR_FP8 = 1e-1  # where a peer rounds queries and softmax weights to fp8 too


def config_for(operation: str, kernel: str | None) -> MLABackendConfig:
    """The environment's settings, with another kernel for the operation where one is named."""
    config = MLABackendConfig.from_environment()
    if kernel is None:
        return config
    return dataclasses.replace(config, kernels=tuple((dict(config.kernels) | {operation: kernel}).items()))


def clock_for(operation: str, config: MLABackendConfig, *, eager: bool) -> Callable[..., float]:
    """What times calls: `graph_us`, or `call_us` if `eager`. Raises BenchmarkError where the named kernel fits no
    graph; one that nobody named always does."""
    if eager:
        return call_us
    name = config.kernel_for(operation)
    with suppress(ImportError):  # why it cannot be imported is for `select` to say
        if not all(kernel.capturable for kernel in OPERATIONS[operation] if kernel.name == name):
            raise BenchmarkError(f"{name} plans on the host, so that no CUDA graph can time it: add --eager")
    return graph_us


def facts_of_run(*, eager: bool) -> dict:
    """What every row says of the machine, and that times have the host's work: no CSV has a column for that."""
    return machine() | ({"eager": True} if eager else {})


def check(actual, wanted, dtype: torch.dtype, magnitude: torch.Tensor | None = None) -> None:
    """Compare (out, lse), both of them whole. Raises AssertionError.   magnitude: as in `assert_matches`, of out."""
    assert_matches("out", actual[0], wanted[0], TOLERANCE[dtype], magnitude)
    assert_matches("lse", actual[1], wanted[1], LSE_TOLERANCE)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: their largest) meanwhile, so that a value which nobody wrote shows."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch, fill = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    switch.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        switch.fill_uninitialized_memory = fill


def check_kernel(case, make_attention: Callable[[], MLAAttention], make_call, matches) -> None:
    """Check our kernel, twice in the same scratch: a call may leave there what spoils the next.

    make_attention: with one operation.   make_call: attention to a function that runs it.
    matches: raises AssertionError for a wrong answer.
    Raises BenchmarkError for one, and when no kernel takes the case.
    """
    try:
        attention = make_attention()
    except (UnsupportedMLA, ValueError) as error:
        raise BenchmarkError(f"case {case}: {error}") from None
    with poisoned_memory():
        call = make_call(attention)
        answers = call(), call()
    for which, actual in zip(("first", "second"), answers, strict=True):
        try:
            matches(actual)
        except AssertionError as error:
            name = kernel_name(attention)
            raise BenchmarkError(f"wrong answer of {name} in case {case}, {which} call: {error}") from None


def kernel_name(attention: MLAAttention) -> str:
    """Of its only operation."""
    (chosen,) = attention.chosen.values()
    return chosen.kernel.name


def peer_error(result, wanted: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> float:
    """Norm of a peer's error over the norm of the right output.

    result: its output, or (output, lse), in any shape that has the tokens first or as many values as `wanted`.
    rows: those of the output that `wanted` has.
    """
    out = result[0] if isinstance(result, tuple | list) else result
    return float((out[rows].float().reshape(wanted.shape) - wanted).norm() / wanted.norm())


def peer_us(peer: str, calls: list[Callable], error_of: Callable[..., float], *, most_error: float, clock, **timing):
    """Microseconds of a peer. Raises when it refuses, and when it computes something else than attention."""
    error = error_of(calls[0]())
    if not error <= most_error:  # NaN too
        print(f"warning: {peer} is off by {error:.1e} of the norm of float32 attention in the next case", flush=True)
        raise BenchmarkError(f"its output differs from float32 attention by more than {most_error:g} of the norm")
    return round(clock(calls, **timing), 2)


def time_peers(
    peers: dict[str, Callable],
    sets: list,
    error_of: Callable[..., float],
    refused: Callable[[str, str], None],
    *,
    clock: Callable[..., float],
    most_error: float = PEER_ERROR,
    **timing,
) -> dict[str, float]:
    """Columns of the peers' microseconds. `refused(peer, reason)` hears why a peer has none.

    peers: functions that make a call of one of `sets`.   error_of: the error of what the first set's call returns, at
    most `most_error`.   clock: as `clock_for` gives it.   timing: its options.
    """
    row, options = {}, {"most_error": most_error, "clock": clock, **timing}
    for peer, make in peers.items():
        try:
            row[f"{peer}_us"] = peer_us(peer, [make(data) for data in sets], error_of, **options)
        except Exception as error:  # whatever a peer says to a shape, or that it is not there, is a result
            refused(peer, why(error))
    return row


def why(error: Exception) -> str:
    """A peer's refusal on one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}, which is not installed"
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return first if isinstance(error, BenchmarkError) else f"{type(error).__name__}: {first:.160}"


def run(cases, verify, measure, *, line: Callable[[dict], str], columns, csv: pathlib.Path | None, eager: bool = False):
    """Check all cases, time them, print a line as each ends.

    verify: case to nothing.   measure: case and `refused` to a row.   eager: whether its times have the host's work.
    Returns the rows, and the cases of each (peer, reason) that left a cell empty. Raises BenchmarkError.
    """
    need_gpu()
    facts, rows = facts_of_run(eager=eager), []
    for case in cases:
        verify(case)
    how = " as the host calls them, its work included" if eager else ""
    if cases:
        print(f"{len(cases)} cases agree with float32 attention on {facts['gpu']}; timing them{how}", flush=True)
    refusals: dict[tuple[str, str], list[str]] = {}
    for case in cases:

        def refused(peer: str, reason: str, case=case) -> None:
            refusals.setdefault((peer, reason), []).append(str(case))

        rows.append(facts | measure(case, refused))
        print(line(rows[-1]), flush=True)
        if csv:
            write_csv(rows, csv, columns)
    return rows, refusals
