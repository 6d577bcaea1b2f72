"""What this machine is. The only module that asks."""

import os
import re
from dataclasses import dataclass
from functools import cache

import torch

# Shared memory that one block may use, in bytes (CUDA C++ programming guide, table of technical
# specifications, "maximum amount of shared memory per thread block"; CDNA3 and CDNA4 ISA guides for LDS).
# Kept as data so that tests can compile for a GPU that is not there.
_CUDA_SHARED_BYTES = {
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    110: 232448,
    120: 101376,
    121: 101376,
}
_HIP_SHARED_BYTES = {"gfx950": 163840}
_SMALLEST_SHARED_BYTES = 65536


@dataclass(frozen=True)
class Device:
    """A device that kernels are chosen and sized for.

    kind: "cuda", "hip" or "cpu".
    arch: 90 for sm_90, "gfx942" for AMD, 0 for a CPU.
    num_sms: multiprocessors (compute units on AMD); on a CPU how many programs to cut work into.
    interpreted: Triton kernels run on CPU tensors (TRITON_INTERPRET=1).
    memory_bytes: of the whole GPU; 0 for a CPU.
    """

    kind: str
    arch: int | str = 0
    name: str = "cpu"
    num_sms: int = 4
    interpreted: bool = False
    memory_bytes: int = 0

    @property
    def runs_triton(self) -> bool:
        return self.kind != "cpu" or self.interpreted

    @property
    def shared_bytes(self) -> int:
        """Shared memory a block may use; the smallest known where the architecture is not."""
        table = _CUDA_SHARED_BYTES if self.kind == "cuda" else _HIP_SHARED_BYTES
        return table.get(self.arch, _SMALLEST_SHARED_BYTES)

    def __str__(self) -> str:
        arch = {"cuda": f"sm_{self.arch}", "hip": f"{self.arch}"}.get(self.kind, "")
        named = " ".join(dict.fromkeys(filter(None, (self.name, arch))))
        return f"{named}{', Triton interpreter' if self.interpreted else ''}"


def device_called(name: str) -> Device:
    """A device of which only the architecture is known: "sm_90", "gfx942" or "cpu". Raises ValueError for others."""
    if match := re.fullmatch(r"sm_(\d+)", name):
        return Device("cuda", int(match[1]), name)
    if re.fullmatch(r"gfx\w+", name):
        return Device("hip", name, name)
    if name == "cpu":
        return Device("cpu")
    raise ValueError(
        f"an architecture is sm_ and a number, such as sm_90, or gfx942 and the like, or cpu; got {name!r}"
    )


def interpreting() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def default_place() -> str:
    """ "cuda" where PyTorch sees a GPU, NVIDIA's or AMD's, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_rocm() -> bool:
    """Whether PyTorch is built for AMD's GPUs."""
    return torch.version.hip is not None


@cache
def cuda_device(index: int) -> Device:
    """The CUDA or ROCm device number `index`."""
    properties = torch.cuda.get_device_properties(index)
    if is_rocm():
        arch = properties.gcnArchName.split(":")[0]
        return Device(
            "hip", arch, properties.name, properties.multi_processor_count, interpreting(), properties.total_memory
        )
    arch = properties.major * 10 + properties.minor
    return Device(
        "cuda", arch, properties.name, properties.multi_processor_count, interpreting(), properties.total_memory
    )


def device_of(where: torch.device | torch.Tensor | str) -> Device:
    """The device that tensors at `where` live on. Asking for a CPU initialises no GPU."""
    device = where.device if isinstance(where, torch.Tensor) else torch.device(where)
    if device.type == "cuda":
        return cuda_device(torch.cuda.current_device() if device.index is None else device.index)
    return Device("cpu", interpreted=interpreting())
