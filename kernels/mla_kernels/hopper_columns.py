"""Queries as columns: how kernels whose products are transposed write answers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_kernels.hopper_load import HALF

# The layout of accumulators of 64 queries, but with two neighbouring rows in a thread: threads of a warp exchange what
# they hold, and need no shared memory for it, of which there is none left.
TALL = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [0, 8], [0, 16], [0, 32], [128, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[256, 64],
    )
)


@gluon.jit
def store(
    acc, ptr, row0, rows, token, stride_t, stride_n, N: gl.constexpr, F: gl.constexpr, IN_16_BYTES: gl.constexpr
):  # fmt: skip
    """Write a [256, F] accumulator's columns that are queries, so that a warp fills whole sectors of the target's rows:
    16 bytes a thread, or two values of 64 queries'. Row r of the target is token + r // N and head r % N."""
    wide: gl.constexpr = gl.BlockedLayout([IN_16_BYTES, 1], [32, 1], [8 // IN_16_BYTES, IN_16_BYTES], [0, 1])
    lay: gl.constexpr = TALL if F == 64 else wide
    i = gl.arange(0, F, gl.SliceLayout(0, lay))
    r = token * N + row0 + i
    at_row = (r // N).to(gl.int64) * stride_t + (r % N).to(gl.int64) * stride_n
    pointer = ptr + at_row[None, :] + gl.arange(0, HALF, gl.SliceLayout(1, lay))[:, None]
    gl.store(pointer, gl.convert_layout(acc, lay).to(ptr.dtype.element_ty), mask=(i < rows)[None, :])
