"""Launch one kernel with arguments of all kinds, and say where `launch` took another code than Triton does.

    python launching_worker.py        one JSON line: launches, codes, launches that Triton saw, and differences

There is no GPU: what Triton compiles does nothing, and stands for itself. Must run without TRITON_INTERPRET.
"""

import itertools
import json

import torch
import triton
import triton.language as tl
from compile_worker import TargetOnly
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mla_kernels import Device
from mla_kernels.launching import launch


class Code:
    """What Triton compiled; launches that came here past Triton are in `LAUNCHED`."""

    function = packed_metadata = None

    def run(self, *_):
        pass

    def launch_metadata(self, *_):
        pass

    def __getitem__(self, grid):
        return lambda *args: LAUNCHED.append((self, grid, args))


class Number(int):
    """Triton looks at its value, too."""


LAUNCHED: list[tuple] = []


def compile_nothing(self, key, signature, device, *_):
    self.device_caches[device][0][key] = code = Code()
    return code


@triton.jit(do_not_specialize=["count", "stride"], do_not_specialize_on_alignment=["lengths_ptr"])
def _kernel(x_ptr, lengths_ptr, scale_ptr, stride, width, count, factor, N: tl.constexpr, WIDE: tl.constexpr):
    pass


def arguments():
    """Of the kernel, by what a difference is called."""
    memory = torch.zeros(64)
    xs = [memory, memory[1:], memory.half(), memory.half()[8:], memory.half()[1:]]
    short = torch.zeros(8, dtype=torch.int32)
    lengths = [short, short[1:], short.long()]
    numbers = [0, 1, 2, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**40 + 1, 2**63 + 1]
    numbers += [Number(1), Number(16), Number(17)]
    yield from itertools.product(xs, lengths, [None, memory[:1]], [1, 3, 2**33], numbers, [7, 16], [0.5, 1.0])


def main() -> None:
    driver.set_active(TargetOnly(Device("cuda", 90)))
    JITFunction._do_compile = compile_nothing
    codes, seen_by_triton, differences, launches = set(), 0, [], 0
    forms = [{"N": 4, "WIDE": False}, {"N": 4, "WIDE": True, "num_warps": 8}]
    for args, constants in itertools.product(arguments(), forms):
        expected = _kernel[(2, 3)](*args, **constants)
        for _ in range(2):  # the first may compile
            LAUNCHED.clear()
            launch(_kernel, (2, 3), *args, **constants)
            seen_by_triton += not LAUNCHED
        (code, grid, passed) = LAUNCHED[0]
        wanted = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args] + [4, constants["WIDE"]]
        if code is not expected or grid != (2, 3, 1) or list(passed) != wanted:
            differences.append(f"{args} {constants}: {grid} {passed}")
        codes.add(code)
        launches += 1
    result = {"launches": launches, "codes": len(codes), "seen": seen_by_triton, "differences": differences[:3]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
