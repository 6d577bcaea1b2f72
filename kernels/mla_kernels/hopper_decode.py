"""The roles of the Hopper decode kernel: who takes the softmax, who adds up values (who copies rows: hopper_load.py).

All loop over the part's pieces of requests in the same order (schedule.py) and meet at barriers only:

  load_keys or gather_keys   fills k, half a block at a time, when it is empty
  attend                     scores of a block (query times k), softmax weights into `weight`
  accumulate                 output += weight times the latent part of k, which is then empty

In names: `row` = query token within the request * N + head. A stage is one of two blocks in shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_kernels.hopper import barrier, ring
from mla_kernels.hopper_load import HALF, LATENT, load_q
from mla_kernels.primitives import LN_2
from mla_kernels.schedule import BLOCK, first_slot, piece

ROWS = gl.constexpr(64)  # of a query tile: what one matrix instruction takes
# The accumulators' layout, but with four neighbouring columns in a thread: threads of a quad exchange what they hold.
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, 128]],
        block_bases=[],
        shape=[64, 256],
    )
)
LAZY = gl.constexpr(8.0)  # binary orders that scores may outgrow their reference before outputs are rescaled
NOTHING = gl.constexpr(-3e38)  # reference of a row that has seen no key: finite, so that differences are numbers


@gluon.jit
def write_plan(plan, shared):
    """What split_merge.py has to merge, each part its own cut.   plan: (plan_ptr, and what `share` says of cuts)."""
    plan_ptr, pieces, cuts, cuts_before = plan
    part = gl.program_id(1)
    if gl.program_id(0) == 0:
        if part == 0:
            gl.store(plan_ptr, cuts)
        if pieces > 0:
            entry = plan_ptr + 4 * (1 + cuts_before)
            gl.store(entry, shared[2])
            gl.store(entry + 1, part)
            gl.store(entry + 2, pieces)


@gluon.jit
def scale_of(scale_ptr):
    """The scale of an fp8 cache, 1 where there is none."""
    scale = 1.0
    if scale_ptr is not None:
        scale = gl.load(scale_ptr)
    return scale


@gluon.jit
def _quad_sums(x):
    """Sums of a [64, 64] tile's rows, as far as a thread can add alone: [64, 4]."""
    return gl.sum(gl.sum(x.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def _weights(s, scale_log2, top, SPLIT: gl.constexpr):
    """Softmax weights of a tile's scores.

    With fixed splits multiply and subtract are one instruction by name. Otherwise the compiler fuses them in one of the
    two places that need weights and not in the other, and whether a row goes through the other is up to all rows.
    """
    return gl.exp2(gl.fma(s, scale_log2, -top[:, None]) if SPLIT > 0 else s * scale_log2 - top[:, None])


@gluon.jit
def _attend_block(
    b, top, total, block, sees, all_see, scale_log2, q_s, q_rope, smem,
    R: gl.constexpr, GATHER: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Scores and softmax weights of block `b`. Returns the rows' references and their sums of weights so far.

    The reference may lag behind the largest score by LAZY, so weights need not wait for the maximum and outputs are
    seldom rescaled (as FlashAttention-4 does).
    """
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    s = gl.zeros([ROWS, BLOCK], gl.float32, s_lay)
    stage, phase, zero = ring(block)
    for half in gl.static_range(2):
        mbarrier.wait(smem.k_full.index(2 * stage + half), phase)
        if GATHER:
            fence_async_shared()  # rows came by ordinary writes
        keys = smem.k.index(2 * stage + half).permute((1, 0))
        s = warpgroup_mma(q_s.index(zero + half), keys, s, use_acc=half > 0, is_async=True)
    if R > 0:
        s = warpgroup_mma(q_rope, smem.k_rope.index(stage).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    if (b + 1) * BLOCK > all_see:
        position = b * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, s_lay))
        s = gl.where(position[None, :] <= sees[:, None], s, float("-inf"))
    weight = _weights(s, scale_log2, top, SPLIT)
    sums = _quad_sums(weight)
    high = gl.max(s, 1) * scale_log2
    grows = high > top + LAZY
    grew = gl.max(grows.to(gl.int32), 0)
    mbarrier.wait(smem.weight_empty, (block & 1) ^ 1)
    smem.weight.store(weight.to(smem.weight.dtype))
    if grew > 0:
        new_top = gl.where(grows, high, top)
        rescale = gl.exp2(top - new_top)
        weight = _weights(s, scale_log2, new_top, SPLIT)
        sums = _quad_sums(weight)
        total = total * gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout))[:, None]
        top = new_top
        smem.weight.store(weight.to(smem.weight.dtype))
        smem.factor.store(rescale)
    smem.grew.store(gl.full([1], 0, gl.int32, flag_lay) + grew)
    fence_async_shared()
    mbarrier.arrive(smem.weight_full, count=1)
    return top, total + sums


@gluon.jit
def write_lse(sum_of_row, top, i, slot, token, row0, rows, lse, N: gl.constexpr):
    """LSE of a piece's rows `i`: no number where their sums are none."""
    lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot = lse
    row_lse = gl.where(sum_of_row == 0, float("-inf"), top + gl.log2(sum_of_row))
    if slot < 0:
        r = token * N + row0 + i
        at_row = (r // N).to(gl.int64) * stride_lse_t + (r % N) * stride_lse_n
        gl.store(lse_ptr + at_row, row_lse * LN_2, mask=i < rows)
    else:
        gl.store(part_lse_ptr + slot * rows_per_slot + row0 + i, row_lse, mask=i < rows)


@gluon.jit
def finish_piece(
    sum_of_row, top, cache_scale, i, slot, pieces, token, row0, rows, lse, smem, N: gl.constexpr
):  # fmt: skip
    """Tell what outputs of a piece's rows `i` have to be multiplied with, and write their LSE.  A tile's rows are query
    rows, or columns that are."""
    safe = gl.where(sum_of_row > 0, sum_of_row, 1.0)
    mbarrier.wait(smem.last_empty, (pieces & 1) ^ 1)
    smem.last.store(cache_scale / safe)
    mbarrier.arrive(smem.last_full, count=1)
    write_lse(sum_of_row, top, i, slot, token, row0, rows, lse, N)


@gluon.jit
def _attend_piece(
    begin, end, slot, block, pieces, sees, all_see, scale_log2, cache_scale, q_s, q_rope, token, row0, rows,
    lse, smem,
    N: gl.constexpr, R: gl.constexpr, GATHER: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Blocks `begin` to `end` from a fresh start, and their LSE. Returns how many blocks and pieces were done."""
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_lay: gl.constexpr = gl.SliceLayout(1, s_lay)
    i = gl.arange(0, ROWS, row_lay)
    top = gl.full([ROWS], NOTHING, gl.float32, row_lay)
    total = _quad_sums(gl.zeros([ROWS, BLOCK], gl.float32, s_lay))
    for b in range(begin, end):
        top, total = _attend_block(b, top, total, block, sees, all_see, scale_log2, q_s, q_rope, smem, R, GATHER, SPLIT)
        block += 1
    sum_of_row = gl.convert_layout(gl.sum(total, 1), row_lay)
    finish_piece(sum_of_row, top, cache_scale, i, slot, pieces, token, row0, rows, lse, smem, N)
    return block, pieces + 1


@gluon.jit
def attend(
    q, lse, plan, scale_log2, scale_ptr, work, smem,
    N: gl.constexpr, R: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr, PACKED: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores, online softmax, weights for the others, and the LSE.

    PACKED: rows of the cache are unpacked, so that registers are few.
    """
    q_s, q_rope_s = q[4], q[5]
    shared, lengths = work
    if SPLIT == 0:
        write_plan(plan, shared)
    row0 = gl.program_id(0) * ROWS
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_lay: gl.constexpr = gl.SliceLayout(1, s_lay)
    i = gl.arange(0, ROWS, row_lay)
    q_lay: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])  # of two rows a thread: few addresses
    cache_scale = scale_of(scale_ptr)
    block = 0
    pieces = 0
    line = first_slot(shared, SPLIT)
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, tokens, rows, slot, line = piece(
            request, shared, lengths, gl.program_id(1), row0, line, N, ROWS, RAGGED, SPLIT
        )
        if rows > 0:
            load_q(q, token, row0, rows, N, ROWS, R, q_lay)
            factor = scale_log2 * cache_scale
            fence_async_shared()
            barrier()
            q_rope = q_rope_s if PACKED else q_rope_s.load(gl.DotOperandLayout(0, s_lay, 2))
            all_see = seq_len - tokens + 1
            sees = seq_len - tokens + (row0 + i) // N  # position of the query itself: the last key it may see
            if SPLIT > 0:
                for split in range(begin, gl.maximum(end, begin + 1), SPLIT):  # one of no blocks if there is no key
                    block, pieces = _attend_piece(
                        split, gl.minimum(split + SPLIT, end), slot, block, pieces, sees, all_see, factor,
                        cache_scale, q_s, q_rope, token, row0, rows, lse, smem, N, R, GATHER, SPLIT,
                    )  # fmt: skip
                    slot += 1
            else:
                block, pieces = _attend_piece(
                    begin, end, slot, block, pieces, sees, all_see, factor,
                    cache_scale, q_s, q_rope, token, row0, rows, lse, smem, N, R, GATHER, SPLIT,
                )  # fmt: skip


@gluon.jit
def wait_for_values(b, block, stage, phase, seq_len, smem, GATHER: gl.constexpr):
    """Until block `b`'s weights are there; its values then are, too, but for rows past the end: zeros from here on."""
    mbarrier.wait(smem.weight_full, block & 1)
    if (b + 1) * BLOCK > seq_len:
        for half in gl.static_range(2):
            mbarrier.wait(smem.k_full.index(2 * stage + half), phase)
            _zero_tail(smem.k.index(2 * stage + half), seq_len - b * BLOCK)
        fence_async_shared()
        barrier()
    if GATHER:
        fence_async_shared()  # rows came by ordinary writes


@gluon.jit
def release_values(acc0, acc1, stage, smem):
    """Wait for the products of either half with its weights, and give halves and weights back. Returns both."""
    acc0 = warpgroup_mma_wait(1, deps=[acc0])
    mbarrier.arrive(smem.k_empty.index(2 * stage), count=1)
    acc1 = warpgroup_mma_wait(0, deps=[acc1])
    mbarrier.arrive(smem.k_empty.index(2 * stage + 1), count=1)
    mbarrier.arrive(smem.weight_empty, count=1)
    return acc0, acc1


@gluon.jit
def _zero_tail(buffer, valid):
    """Zero the rows of a [64, 256] buffer from `valid` on: no request owns them, and 0 * NaN is NaN."""
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, lay))
    for u in gl.static_range(4):
        part = buffer.slice(u * 16, 16, dim=0)
        part.store(gl.where((u * 16 + row < valid)[:, None], part.load(lay), 0.0))


@gluon.jit
def _accumulate_block(b, acc0, acc1, block, seq_len, smem, GATHER: gl.constexpr):
    """Add block `b`'s weights times values to the accumulators of the two halves of the columns."""
    row_lay: gl.constexpr = gl.SliceLayout(1, acc0.type.layout)
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    stage, phase, _ = ring(block)
    wait_for_values(b, block, stage, phase, seq_len, smem, GATHER)
    if gl.max(smem.grew.load(flag_lay), 0) > 0:
        rescale = smem.factor.load(row_lay)[:, None]
        acc0 = acc0 * rescale
        acc1 = acc1 * rescale
    acc0 = warpgroup_mma(smem.weight, smem.k.index(2 * stage), acc0, is_async=True)
    acc1 = warpgroup_mma(smem.weight, smem.k.index(2 * stage + 1), acc1, is_async=True)
    return release_values(acc0, acc1, stage, smem)


@gluon.jit
def _store(acc, ptr, row0, rows, token, stride_t, stride_n, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Write the rows of a [64, 256] accumulator that are queries, in a layout that fills sectors of 32 bytes.

    Row r is token + r // N and head r % N, computed from one number that no compiler can keep in registers meanwhile.
    """
    i = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    r = token * N + row0 + i
    at_row = (r // N).to(gl.int64) * stride_t + (r % N).to(gl.int64) * stride_n
    pointer = ptr + at_row[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(pointer, gl.convert_layout(acc, LAYOUT).to(ptr.dtype.element_ty), mask=(i < rows)[:, None])


@gluon.jit
def _accumulate_piece(
    begin, end, slot, block, pieces, seq_len, token, row0, rows, out, smem,
    N: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Blocks `begin` to `end` from a fresh start, and their outputs. Returns how many blocks and pieces were done."""
    out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot = out
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 16])
    row_lay: gl.constexpr = gl.SliceLayout(1, o_lay)
    acc0 = gl.zeros([ROWS, HALF], gl.float32, o_lay)
    acc1 = gl.zeros([ROWS, HALF], gl.float32, o_lay)
    for b in range(begin, end):
        acc0, acc1 = _accumulate_block(b, acc0, acc1, block, seq_len, smem, GATHER)
        block += 1
    mbarrier.wait(smem.last_full, pieces & 1)
    last = smem.last.load(row_lay)[:, None]
    mbarrier.arrive(smem.last_empty, count=1)
    pieces += 1
    acc0 = acc0 * last
    acc1 = acc1 * last
    if slot < 0:
        _store(acc0, out_ptr, row0, rows, token, stride_out_t, stride_out_n, N, WIDE)
        _store(acc1, out_ptr + HALF, row0, rows, token, stride_out_t, stride_out_n, N, WIDE)
    else:
        _store(acc0, part_ptr, row0, rows, slot * rows_per_slot, LATENT, 0, 1, o_lay)
        _store(acc1, part_ptr + HALF, row0, rows, slot * rows_per_slot, LATENT, 0, 1, o_lay)
    return block, pieces


@gluon.jit
def accumulate(
    out, work, smem, N: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """Two warpgroups: weights times values. Each holds 128 columns of either half of the output."""
    shared, lengths = work
    row0 = gl.program_id(0) * ROWS
    block = 0
    pieces = 0
    line = first_slot(shared, SPLIT)
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, _, rows, slot, line = piece(
            request, shared, lengths, gl.program_id(1), row0, line, N, ROWS, RAGGED, SPLIT
        )
        if rows > 0:
            if SPLIT > 0:
                for split in range(begin, gl.maximum(end, begin + 1), SPLIT):
                    block, pieces = _accumulate_piece(
                        split, gl.minimum(split + SPLIT, end), slot, block, pieces, seq_len, token, row0, rows, out,
                        smem, N, GATHER,
                    )  # fmt: skip
                    slot += 1
            else:
                block, pieces = _accumulate_piece(
                    begin, end, slot, block, pieces, seq_len, token, row0, rows, out, smem, N, GATHER
                )
