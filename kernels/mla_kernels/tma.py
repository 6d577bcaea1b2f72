"""TMA descriptors, made once for the same memory: layers of a model get theirs again and again."""

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mla_kernels.hopper import NARROW, SWIZZLED, SWIZZLED_CODES


class _Memory(NamedTuple):
    """What a descriptor knows of a tensor: no reference, which would keep it from being freed.

    form: what code depends on, in all descriptors of this file.   where: what `describe` was told beside the address.
    """

    address: int
    dtype: torch.dtype
    form: tuple
    where: tuple

    def data_ptr(self) -> int:
        return self.address

    def at(self, address: int) -> TensorDescriptor:
        """Of the same rows at another address."""
        return describe(address, *self.where)


@lru_cache(1024)
def describe(address: int, dtype: torch.dtype, shape: tuple[int, int], row_stride: int, box: tuple[int, int]):
    """Of `shape` rows and columns at `address`, a multiple of 16 bytes; `box` of them are copied at once.

    Columns are adjacent, rows `row_stride` values apart, a multiple of 16 bytes. A box has rows of 128 bytes, or of 16.
    """
    memory = _Memory(address, dtype, form=(dtype, box), where=(dtype, shape, row_stride, box))
    layout = SWIZZLED if dtype != torch.int8 else SWIZZLED_CODES if box[1] == 128 else NARROW
    return TensorDescriptor(memory, list(shape), [row_stride, 1], list(box), layout.value)
