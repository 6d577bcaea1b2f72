"""Queries as columns: how kernels whose products are transposed sum up weights and write answers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_kernels.hopper_load import HALF, LATENT

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


@gluon.constexpr_function
def tile_layout(F):
    """Who holds what of outputs, [128 columns, F queries], that four warps made of words of four columns: all four
    columns of a word are a thread's."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [0, 1], [0, 8], [0, 16], [0, 32]][: {16: 4, 32: 5, 64: 6}[F]],
        lane_bases=[[0, 2], [0, 4], [4, 0], [8, 0], [16, 0]],
        warp_bases=[[32, 0], [64, 0]],
        block_bases=[],
        shape=[128, F],
    )


@gluon.jit
def thread_sums(x, KEYS: gl.constexpr, F: gl.constexpr):
    """Sums of columns as far as a thread adds alone: its two rows."""
    return gl.sum(x.reshape([KEYS // 16, 2, 8, F]), 1)


@gluon.jit
def rescale_sums(total, rescale):
    return total * gl.convert_layout(rescale, gl.SliceLayout(0, gl.SliceLayout(1, total.type.layout)))[None, None, :]


@gluon.jit
def store_tile(acc0, acc1, column, slot, out, row0, rows, token, N: gl.constexpr, F: gl.constexpr):
    """Write 128 columns of outputs from `column` on: of a word's first two and last two columns, [64, F] each."""
    lay: gl.constexpr = tile_layout(F)
    out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot = out
    x = gl.join(acc0, acc1).reshape([4, 2, 8, F, 2]).permute((0, 2, 4, 1, 3)).reshape([HALF // 2, F])
    x = gl.convert_layout(x, lay)
    i = gl.arange(0, F, gl.SliceLayout(0, lay))
    c = column + gl.arange(0, HALF // 2, gl.SliceLayout(1, lay))
    here = (i < rows)[None, :]
    if slot < 0:
        r = token * N + row0 + i
        at_row = (r // N).to(gl.int64) * stride_out_t + (r % N).to(gl.int64) * stride_out_n
        gl.store(out_ptr + at_row[None, :] + c[:, None], x.to(out_ptr.dtype.element_ty), mask=here)
    else:
        at_row = (slot * rows_per_slot + row0 + i).to(gl.int64) * LATENT
        gl.store(part_ptr + at_row[None, :] + c[:, None], x, mask=here)


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
