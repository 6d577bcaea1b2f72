"""Launch a Triton kernel in less of the host's time than Triton takes.

At every launch Triton asks what each argument means for the code and checks all global names that the code used, and
the driver looks up every pointer. In a step that no CUDA graph holds that was most of what a layer of ours took of the
host: beside an H200 (2026-11-27, Triton 3.6) 144 us for a decode with its merge, 43 us for a cache write. Here a table
has what Triton compiled, by all that its code depends on, and Triton's launcher is called as Triton calls it then.

Hooks for launches are called as ever. What Triton asks of its settings at each launch (debug, instrumentation, hooks
before a run) is asked at the first of each kind; with BY_TABLE = False it is at every one, and nothing is repeated.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mla_kernels.device import is_rocm

# Code for AMD depends on more: on whether 32-bit offsets reach all of a tensor's memory.
BY_TABLE = not is_rocm()


class _Code(NamedTuple):
    """What Triton has compiled, loaded on a device, and the compile-time arguments that it was compiled for."""

    compiled: CompiledKernel  # unloads the others when it goes
    run: Callable
    function: int
    device: int
    constants: tuple


class _Kind(NamedTuple):
    """Launches of one kernel with arguments of the same types: which of them say what code they need.

    tensors: which arguments, and the bytes at whose multiples memory gets code of its own: 16, or 1 where all has one.
    constants: names of compile-time parameters.
    compiled: by all else that the code depends on.
    recent: the same by what takes less time to put together, integers as they are. Layers of a step launch with the
        same ones; other steps have others, and this is emptied when it grows.
    """

    kernel: JITFunction  # so that no other kernel gets its id
    tensors: tuple[tuple[int, int], ...]
    pointers: tuple[int, ...]  # the same arguments
    integers: tuple[int, ...]  # of any value
    specialised: tuple[int, ...]  # integers for whose multiples of 16 there is other code, and for 1
    descriptors: tuple[int, ...]  # of tma.py
    constants: tuple[str, ...]
    compiled: dict[tuple, _Code]
    recent: dict[tuple, _Code]


class Made(NamedTuple):
    """A launch as it was made.

    args: with what the code was compiled for, and for tensors their addresses.
    tensors, descriptors: which of them are one's address, or a descriptor of tma.py.
    """

    code: _Code
    grid: tuple[int, int, int]
    args: tuple
    tensors: tuple[int, ...]
    descriptors: tuple[int, ...]


class _Recording(threading.local):
    launches: list[Made | None] | None = None


_RECORDING = _Recording()
_MOST_RECENT = 1024
_KINDS: dict[tuple, _Kind] = {}  # by id of the kernel, whose own hash is slow, and types of the arguments


def forget() -> None:
    """Let Triton see the next launch of every kernel, of calls that repeats.py has not kept. For tests that pretend to
    be on another machine."""
    _KINDS.clear()


def is_recording() -> bool:
    """In this thread."""
    return _RECORDING.launches is not None


@contextlib.contextmanager
def recorded() -> Iterator[list[Made | None]]:
    """The launches that this thread makes meanwhile, in order; None for each that Triton made itself. Not within
    another."""
    _RECORDING.launches = launches = []
    try:
        yield launches
    finally:
        _RECORDING.launches = None


def _kind_of(kernel: JITFunction, args: tuple) -> _Kind:
    given = [parameter for parameter in kernel.params if not parameter.is_constexpr]
    constants = [parameter for parameter in kernel.params if parameter.is_constexpr]
    if kernel.params != given + constants or len(given) != len(args):
        raise TypeError(f"{kernel.__name__} wants its arguments by position, and behind them compile-time ones by name")
    tensors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
    integers = [i for i, x in enumerate(args) if isinstance(x, int) and not isinstance(x, bool)]
    by_value = [i for i in integers if not given[i].do_not_specialize]
    plain = [given[i].do_not_specialize or given[i].do_not_specialize_on_alignment for i in tensors]
    return _Kind(
        kernel=kernel,
        tensors=tuple((i, 1 if is_plain else 16) for i, is_plain in zip(tensors, plain, strict=True)),
        pointers=tuple(tensors),
        integers=tuple(integers),
        specialised=tuple(by_value),
        descriptors=tuple(i for i, x in enumerate(args) if hasattr(x, "block_shape")),
        constants=tuple(parameter.name for parameter in constants),
        compiled={},
        recent={},
    )


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """`kernel[grid](*args, **constants)`, with compile-time arguments and options by name, all others by position.

    Tensors must be on the current device.
    """
    if not (BY_TABLE and isinstance(kernel, JITFunction)):  # the interpreter compiles nothing
        kernel[grid](*args, **constants)
        _record(None)
        return
    types = (id(kernel), *map(type, args))
    kind = _KINDS.get(types)
    if kind is None:
        kind = _KINDS[types] = _kind_of(kernel, args)
    passed, key = [*args], [*args, *constants, *constants.values()]
    for i, boundary in kind.tensors:
        x = args[i]
        passed[i] = address = x.data_ptr()  # which the driver need not look up
        key[i] = x.dtype
        key += x.get_device(), address % boundary == 0
    for i in kind.descriptors:
        key[i] = args[i].base.form
    recent = tuple(key)
    code = kind.recent.get(recent)
    if code is None:
        code = _find(kind, key, grid, args, constants)
        if code is None:  # Triton has launched it
            _record(None)
            return
        if len(kind.recent) >= _MOST_RECENT:
            kind.recent.clear()
        kind.recent[recent] = code
    made = Made(code, (*grid, 1, 1)[:3], (*passed, *code.constants), kind.pointers, kind.descriptors)
    _record(made)
    start(code, made.grid, made.args)


def _record(made: Made | None) -> None:
    if is_recording():
        _RECORDING.launches.append(made)


def start(code: _Code, grid: tuple[int, int, int], args: Sequence) -> None:
    """As Triton does when it has found what to launch, but what hooks would hear is put together if one listens."""
    compiled, hooks = code.compiled, knobs.runtime
    stream = driver.active.get_current_stream(code.device)
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    metadata = None
    if _listens(enter) or _listens(leave):
        metadata = compiled.launch_metadata(grid, stream, *args)
    else:
        enter = leave = None
    code.run(*grid, stream, code.function, compiled.packed_metadata, metadata, enter, leave, *args)


def _listens(hook) -> bool:
    """Whether a hook of Triton, by default a chain of functions without one, does anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _find(kind: _Kind, key: list, grid: tuple[int, ...], args: tuple, constants: dict) -> _Code | None:
    """What Triton has compiled for these arguments; None after a launch by Triton.

    key: all that the code depends on, with numbers as they are.
    """
    for i, x in enumerate(args):
        if isinstance(x, float):
            key[i] = None  # of any value
    for i in kind.integers:
        # Of 32 bits, of 64, or of 64 without a sign.
        key[i] = 32 if -0x80000000 <= args[i] < 0x80000000 else 64 + args[i].bit_length() // 64
    for i in kind.specialised:
        key += args[i] == 1, args[i] % 16 == 0
    code = kind.compiled.get(tuple(key))
    if code is None:
        compiled = kind.kernel[grid](*args, **constants)
        # A hook may have kept Triton from compiling, or it compiles still; and on another device than its tensors' it
        # would stand here for good.
        device = driver.active.get_current_device()
        if hasattr(type(compiled), "__getitem__") and {args[i].get_device() for i, _ in kind.tensors} <= {-1, device}:
            last = tuple(constants[name] for name in kind.constants)
            kind.compiled[tuple(key)] = _Code(compiled, compiled.run, compiled.function, device, last)
    return code
