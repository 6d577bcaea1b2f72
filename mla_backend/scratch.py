"""Memory that kernels use within a call: reserved once, shared by calls that never run at the same time."""

import math
from functools import cache

import torch

from mla_kernels import tensor_bytes

_ALIGNMENT = 256  # bytes: what allocators of GPUs give, so that kernels see no difference


class Scratch:
    """One buffer on a device, of which every caller takes as much as it needs, from the start.

    shapes: ((shape, dtype), ...), as `MLAAttention.decode_workspace` gives them.
    """

    def __init__(self, device: torch.device):
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.take = cache(self._take)  # all layers ask the same in every step

    @property
    def bytes(self) -> int:
        return len(self._buffer)

    def reserve(self, shapes) -> None:
        """Have room for `shapes`, at a new address if there is not enough: never after graphs were captured, which read
        the old one."""
        wanted = scratch_bytes(shapes)
        if wanted > self.bytes:
            self._buffer = torch.empty(wanted, dtype=torch.uint8, device=self._buffer.device)
            self.take.cache_clear()

    def _take(self, shapes) -> list[torch.Tensor]:
        if scratch_bytes(shapes) > self.bytes:
            raise ValueError(
                f"scratch of {scratch_bytes(shapes)} bytes is needed, and {self.bytes} were reserved before serving; "
                "please report this batch: serving must not allocate scratch"
            )
        views, at = [], 0
        for shape, dtype in shapes:
            views.append(self._buffer[at : at + tensor_bytes(shape, dtype)].view(dtype).view(shape))
            at += _aligned(shape, dtype)
        return views


def scratch_bytes(shapes) -> int:
    """Bytes that a buffer for tensors of `shapes` must have."""
    return sum(_aligned(shape, dtype) for shape, dtype in shapes)


def _aligned(shape, dtype) -> int:
    return math.ceil(tensor_bytes(shape, dtype) / _ALIGNMENT) * _ALIGNMENT
