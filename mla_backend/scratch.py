"""Memory that kernels use within a call, shared by calls that never run at the same time: reserved, or a step's."""

import math
from functools import cache

import torch

from mla_kernels import tensor_bytes

_COUNTERS = 64  # filled at once: as many as layers of the largest models
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


class StepMemory:
    """Memory that the layers of one step use one after another, in one stream.

    Each step has its own: an engine may take away what memory held between two steps. In a CUDA graph, which outlives
    the step and does again only what it has captured, there is none.
    """

    def __init__(self):
        self._counters: list[torch.Tensor] = []
        self._lse_TN: torch.Tensor | None = None

    def counter(self, device: torch.device) -> torch.Tensor | None:
        """An int32 of 0 that nobody else gets: one fill is for many launches. None if there is none."""
        if _is_capturing(device):
            return None
        if not self._counters:
            # 16 bytes apart, so that launches of layers differ in nothing but addresses.
            zeros = torch.zeros(_COUNTERS, 4, dtype=torch.int32, device=device)
            self._counters.extend(zeros[:, 0].unbind())
        return self._counters.pop()

    def lse_of(self, q_TNQ: torch.Tensor) -> torch.Tensor:
        """Float32 for a number for each query and head, the same for all layers."""
        shape = q_TNQ.shape[:2]
        if _is_capturing(q_TNQ.device):
            return q_TNQ.new_empty(shape, dtype=torch.float32)
        if self._lse_TN is None or self._lse_TN.shape != shape:
            self._lse_TN = q_TNQ.new_empty(shape, dtype=torch.float32)
        return self._lse_TN


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
