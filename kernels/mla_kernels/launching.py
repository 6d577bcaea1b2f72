"""Launch a Triton kernel in less of the host's time than Triton takes.

At every launch Triton asks what each argument means for the code and checks all global names that the code used, and
the driver looks up every pointer. In a step that no CUDA graph holds that was most of what a layer of ours took of the
host: beside an H200 (2026-11-27, Triton 3.6) 144 us for a decode with its merge, 43 us for a cache write. Here a table
has what Triton compiled, by all that its code depends on.

Hooks for launches are called as ever. What Triton asks of its settings at each launch (debug, instrumentation, hooks
before a run) is asked at the first of each kind; with BY_TABLE = False it is at every one.
"""

from typing import NamedTuple

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mla_kernels.device import is_rocm

# Code for AMD depends on more: on whether 32-bit offsets reach all of a tensor's memory.
BY_TABLE = not is_rocm()


class _Kind(NamedTuple):
    """Launches of one kernel with arguments of the same types: which of them say what code they need.

    constants: names of compile-time parameters.
    compiled: by all else that the code depends on, what Triton made, and its compile-time arguments.
    """

    kernel: JITFunction  # so that no other kernel gets its id
    tensors: tuple[int, ...]
    aligned: tuple[int, ...]  # among the tensors: there is other code where memory is at multiples of 16 bytes
    integers: tuple[int, ...]  # of any value
    specialised: tuple[int, ...]  # integers for whose multiples of 16 there is other code, and for 1
    descriptors: tuple[int, ...]
    constants: tuple[str, ...]
    compiled: dict[tuple, tuple]


_KINDS: dict[tuple, _Kind] = {}  # by id of the kernel, whose own hash is slow, and types of the arguments


def forget() -> None:
    """Let Triton see the next launch of every kernel. For tests that pretend to be on another machine."""
    _KINDS.clear()


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
        tensors=tuple(tensors),
        aligned=tuple(i for i, is_plain in enumerate(plain) if not is_plain),
        integers=tuple(integers),
        specialised=tuple(by_value),
        descriptors=tuple(i for i, x in enumerate(args) if hasattr(x, "block_shape")),
        constants=tuple(parameter.name for parameter in constants),
        compiled={},
    )


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """`kernel[grid](*args, **constants)`, with compile-time arguments and options by name, all others by position.

    Tensors must be on the current device.
    """
    if not (BY_TABLE and isinstance(kernel, JITFunction)):  # the interpreter compiles nothing
        kernel[grid](*args, **constants)
        return
    types = (id(kernel), *map(type, args))
    kind = _KINDS.get(types)
    if kind is None:
        kind = _KINDS[types] = _kind_of(kernel, args)
    passed = list(args)
    key = list(constants.items())
    for i in kind.tensors:
        x = args[i]
        passed[i] = x.data_ptr()  # which the driver need not look up
        key += x.dtype, x.get_device()
    for i in kind.aligned:
        key.append(passed[kind.tensors[i]] % 16 == 0)
    for i in kind.integers:
        # Of 32 bits, of 64, or of 64 without a sign.
        key.append(32 if -0x80000000 <= args[i] < 0x80000000 else 64 + args[i].bit_length() // 64)
    for i in kind.specialised:
        key += args[i] == 1, args[i] % 16 == 0
    for i in kind.descriptors:
        x = args[i]
        key += x.base.dtype, *x.block_shape, x.layout
    key = tuple(key)
    found = kind.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        # A hook may have kept Triton from compiling, or it compiles still; and on another device than its tensors' it
        # would stand here for good.
        here = {-1, driver.active.get_current_device()}
        if hasattr(type(compiled), "__getitem__") and {args[i].get_device() for i in kind.tensors} <= here:
            kind.compiled[key] = compiled, [constants[name] for name in kind.constants]
    else:
        compiled, last = found
        compiled[(*grid, 1, 1)[:3]](*passed, *last)
