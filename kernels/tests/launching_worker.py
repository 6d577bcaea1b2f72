"""Launch kernels with arguments of all kinds, and say where `launch` took another code than Triton does.

    python launching_worker.py        one JSON line: launches, codes, launches that Triton saw, differences, and what
                                      hooks heard: of two launches with hooks, and of one behind them

There is no GPU: what Triton compiles does nothing, and stands for itself. Must run without TRITON_INTERPRET.
"""

import itertools
import json

import torch
import triton
import triton.language as tl
from compile_worker import TargetOnly
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mla_kernels import Device
from mla_kernels.launching import launch
from mla_kernels.tma import describe


class Code:
    """What Triton compiled; its launches are in `LAUNCHED`."""

    function, packed_metadata = object(), object()

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter, leave, *args):
        assert (stream, function, packed_metadata) == (STREAM, self.function, self.packed_metadata)
        for hook in (enter, leave):
            if hook is not None:  # Triton's launcher asks no more either
                hook(metadata)
        LAUNCHED.append((self, (x, y, z), args))

    def launch_metadata(self, grid, stream, *args):
        return self, grid, stream, args

    def __getitem__(self, grid):
        raise AssertionError("launches are not made so")


class Number(int):
    """Triton looks at its value, too."""


class Driver(TargetOnly):
    def get_current_stream(self, device):
        assert device == self.get_current_device()
        return STREAM


STREAM = 77
LAUNCHED: list[tuple] = []
SEEN: list[JITFunction] = []  # what was launched through Triton


def compile_nothing(self, key, signature, device, *_):
    self.device_caches[device][0][key] = code = Code()
    return code


def run_by_triton(self, *args, **options):
    SEEN.append(self)
    return RUN(self, *args, **options)


RUN = JITFunction.run


@triton.jit(do_not_specialize=["count", "stride"], do_not_specialize_on_alignment=["lengths_ptr"])
def _kernel(x_ptr, lengths_ptr, scale_ptr, stride, width, count, factor, N: tl.constexpr, WIDE: tl.constexpr):
    pass


@triton.jit(do_not_specialize=["count"])
def _copying_kernel(a_desc, b_desc, count, N: tl.constexpr):
    pass


def arguments():
    """Of the first kernel."""
    memory = torch.zeros(64)
    xs = [memory, memory[1:], memory.half(), memory.half()[8:], memory.half()[1:]]
    short = torch.zeros(8, dtype=torch.int32)
    lengths = [short, short[1:], short.long()]
    numbers = [0, 1, 2, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**40 + 1, 2**63 + 1]
    numbers += [Number(1), Number(16), Number(17)]
    yield from itertools.product(xs, lengths, [None, memory[:1]], [1, 3, 2**33], numbers, [7, 16], [0.5, 1.0])


def descriptors():
    """For the second: of two addresses, shapes, dtypes and boxes."""
    for address, dtype, rows, box in itertools.product(
        (0, 1024), (torch.float16, torch.bfloat16), (64, 100), ((64, 64), (128, 64))
    ):
        yield describe(address, dtype, (rows, 256), 256, box)


def calls():
    """(kernel, arguments, compile-time ones)."""
    for args, wide in itertools.product(arguments(), ({"WIDE": False}, {"WIDE": True, "num_warps": 8})):
        yield _kernel, args, {"N": 4, **wide}
    for a, b, count in itertools.product(descriptors(), descriptors(), (1, 2**40)):
        yield _copying_kernel, (a, b, count), {"N": 4}


def address_of(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def heard(kernel, args, constants) -> list:
    """How many arguments each hook hears of, at launches with hooks and at one behind them."""
    hooks, metadata = knobs.runtime, []
    for chain in (hooks.launch_enter_hook, hooks.launch_exit_hook):
        chain.add(metadata.append)
        launch(kernel, (2, 3), *args, **constants)
        chain.remove(metadata.append)
    launch(kernel, (2, 3), *args, **constants)
    return [len(of_launch[-1]) for of_launch in metadata]


def main() -> None:
    driver.set_active(Driver(Device("cuda", 90)))
    JITFunction._do_compile, JITFunction.run = compile_nothing, run_by_triton
    codes, differences, launches = set(), [], 0
    for kernel, args, constants in calls():
        expected = kernel[(2, 3)](*args, **constants)
        del SEEN[-1]
        for _ in range(2):  # the first may compile
            LAUNCHED.clear()
            launch(kernel, (2, 3), *args, **constants)
        ((code, grid, passed),) = LAUNCHED
        wanted = [*map(address_of, args), *(value for name, value in constants.items() if name != "num_warps")]
        if code is not expected or grid != (2, 3, 1) or list(passed) != wanted:
            differences.append(f"{args} {constants}: {grid} {passed}")
        codes.add(code)
        launches += 1
    result = {"launches": launches, "codes": len(codes), "seen": len(SEEN), "differences": differences[:3]}
    print(json.dumps(result | {"heard": heard(kernel, args, constants)}))


if __name__ == "__main__":
    main()
