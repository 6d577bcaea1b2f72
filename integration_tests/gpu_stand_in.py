"""A GPU that is not there: Triton's own launcher, which finds out for itself what it has to compile, compiles nothing
and launches nothing.

`pretend(device)` must run before kernels are imported, without TRITON_INTERPRET. What Triton would compile from then on
is in `COMPILED`, or goes elsewhere. Results of kernels are what their memory held: this counts launches, and shows
nothing about values.
"""

from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import mla_kernels
import mla_kernels.device
from mla_kernels import Device, launching, repeats

DEVICES = {
    "H200": Device("cuda", 90, "H200", 132, False, 141 << 30),
    "H100 PCIe": Device("cuda", 90, "H100 PCIe", 114, False, 80 << 30),
    "A100": Device("cuda", 80, "A100", 108, False, 80 << 30),
    "RTX 3090": Device("cuda", 86, "RTX 3090", 82, False, 24 << 30),
}
COMPILED: list[list[str]] = []  # [kernel, its key], in order
_FUNCTIONS: set[JITFunction] = set()


class _Driver:
    """A driver without a device."""

    def __init__(self, device: Device):
        self._target = GPUTarget(device.kind, device.arch, 64 if device.kind == "hip" else 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Nothing:
    """A compiled kernel, launched by Triton or as kernel[grid](...)."""

    function = packed_metadata = None

    def run(self, *_):
        pass

    def launch_metadata(self, *_):
        pass

    def __getitem__(self, grid):
        return self.run


def _compile_nothing(note, function: JITFunction, key, signature, device, *_):
    """In place of a compilation: say that there was one, and make a kernel that does nothing."""
    note([function.__name__, str(key)])
    _FUNCTIONS.add(function)
    kernels = function.device_caches[device][0]
    kernels[key] = _Nothing()
    return kernels[key]


def start_anew() -> None:
    """Nothing was ever compiled."""
    COMPILED.clear()
    launching.forget()
    repeats.forget()
    for function in _FUNCTIONS:
        function.device_caches.clear()


def pretend(device: Device, note: Callable[[list], None] = COMPILED.append, *, numbers: bool = True) -> None:
    """Make every tensor of this process live on `device`, as far as kernels and adapters ask. `note` is called with
    [kernel, its key] for each kernel that Triton would compile.

    numbers: whether new tensors must hold such, for an engine, which chokes on NaN. If not, nothing is written to them.
    """
    mla_kernels.device_of = mla_kernels.device.device_of = lambda where: device
    driver.set_active(_Driver(device))
    JITFunction._do_compile = lambda *args: _compile_nothing(note, *args)
    if numbers:
        torch.Tensor.new_empty = torch.Tensor.new_zeros
    else:
        torch.Tensor.new_zeros = torch.Tensor.new_empty
