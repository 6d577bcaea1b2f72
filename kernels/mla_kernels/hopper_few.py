"""The roles of the Hopper decode kernel for few query rows: everything transposed.

A matrix instruction takes 64 rows. Where queries are 16 or 32, these are better keys, and queries its columns:

  load_keys, gather_keys or convert_keys   fills k, half a block at a time, when it is empty
  attend                                   k times query: scores [64 keys, F queries]; softmax weights into `weight`
  accumulate                               output [512, F] += latent part of k, transposed, times weight

So a block takes a quarter or half of the time on the tensor cores that it takes with queries as rows, and accumulators
fit registers with room to spare. Pieces, barriers and names are those of hopper_decode.py; F is 16 or 32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_kernels.hopper import SWIZZLED, barrier, cp_async, reinterpret, ring
from mla_kernels.hopper_decode import LAZY, NOTHING, release_values, scale_of, wait_for_values, write_plan
from mla_kernels.hopper_load import HALF, LATENT, TILE
from mla_kernels.hopper_shrink import shrink_q
from mla_kernels.primitives import LN_2
from mla_kernels.schedule import BLOCK, piece


@gluon.jit
def _copy_q(target, q_ptr, strides8, token, row0, rows, column, N: gl.constexpr, F: gl.constexpr, WIDTH: gl.constexpr):
    """Start copying columns column .. column + WIDTH - 1 of the query rows."""
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    c = column + gl.arange(0, WIDTH, gl.SliceLayout(0, lay))
    i = gl.arange(0, F, gl.SliceLayout(1, lay))
    r = token * N + row0 + i
    offset = ((r // N).to(gl.int64) * strides8[0] + (r % N).to(gl.int64) * strides8[1]) * 8
    cp_async(target, q_ptr + offset[:, None] + c[None, :], mask=(i < rows)[:, None])


@gluon.jit
def _attend_block(
    b, top, total, block, sees, all_see, scale_log2, columns_scale, q_s, q_rope_s, smem,
    F: gl.constexpr, R: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Scores and softmax weights of block `b`. Returns the queries' references, and sums of weights that no thread has
    added to another's yet: [64, F].

    scale_log2, columns_scale: one factor of all scores, twice, or one for each query, as [F] and [1, F].
    The reference may lag behind the largest score by LAZY, as in hopper_decode.py.
    """
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    s = gl.zeros([BLOCK, F], gl.float32, s_lay)
    stage, phase, zero = ring(block)
    for half in gl.static_range(2):
        mbarrier.wait(smem.k_full.index(2 * stage + half), phase)
        if GATHER:
            fence_async_shared()  # rows came by ordinary writes
        keys = smem.k.index(2 * stage + half)
        s = warpgroup_mma(keys, q_s.index(zero + half).permute((1, 0)), s, use_acc=half > 0, is_async=True)
    if R > 0:
        s = warpgroup_mma(smem.k_rope.index(stage), q_rope_s.permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    if (b + 1) * BLOCK > all_see:
        position = b * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, s_lay))
        s = gl.where(position[:, None] <= sees[None, :], s, float("-inf"))
    high = gl.max(s, 0) * scale_log2
    grows = high > top + LAZY
    new_top = gl.where(grows, high, top)
    rescale = gl.exp2(top - new_top)
    grew = gl.max(grows.to(gl.int32), 0)
    weight = gl.exp2(s * columns_scale - new_top[None, :])
    mbarrier.wait(smem.weight_empty, (block & 1) ^ 1)
    smem.weight.store(weight.to(smem.weight.dtype))
    smem.factor.store(rescale)
    smem.grew.store(gl.full([1], 0, gl.int32, flag_lay) + grew)
    fence_async_shared()
    mbarrier.arrive(smem.weight_full, count=1)
    return new_top, total * rescale[None, :] + weight


@gluon.jit
def attend(
    q, lse, plan, scale_log2, scale_ptr, work, smem,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr,
    CONVERT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores, online softmax, weights for the others, and the LSE. With CONVERT all in float16."""
    q_latent_ptr, q_rope_ptr, latent_strides8, rope_strides8, q_s, q_rope_s = q
    lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot = lse
    shared, lengths = work
    write_plan(plan, shared)
    row0 = gl.program_id(0) * F
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    query_lay: gl.constexpr = gl.SliceLayout(0, s_lay)
    i = gl.arange(0, F, query_lay)
    cache_scale = scale_of(scale_ptr)
    block = 0
    pieces = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, tokens, rows, slot, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0
        )
        if rows > 0:
            raw = reinterpret(q_s, q_latent_ptr.dtype.element_ty, [2, F, HALF], SWIZZLED)
            raw_rope = reinterpret(q_rope_s, q_latent_ptr.dtype.element_ty, [F, TILE], SWIZZLED)
            for half in gl.static_range(2):
                _copy_q(raw.index(half), q_latent_ptr, latent_strides8, token, row0, rows, half * HALF, N, F, HALF)
            if R > 0:
                _copy_q(raw_rope, q_rope_ptr, rope_strides8, token, row0, rows, 0, N, F, TILE)
            async_copy.commit_group()
            async_copy.wait_group(0)
            factor = scale_log2 * cache_scale
            columns_factor = factor
            if CONVERT:
                power = shrink_q(q_s, q_rope_s, q_latent_ptr.dtype.element_ty, F, R)
                factor = factor * gl.convert_layout(power, query_lay)
                columns_factor = factor[None, :]
            fence_async_shared()
            barrier()
            all_see = seq_len - tokens + 1
            sees = seq_len - tokens + (row0 + i) // N  # position of the query itself: the last key it may see
            top = gl.full([F], NOTHING, gl.float32, query_lay)
            total = gl.zeros([BLOCK, F], gl.float32, s_lay)
            for b in range(begin, end):
                top, total = _attend_block(
                    b, top, total, block, sees, all_see, factor, columns_factor, q_s, q_rope_s, smem, F, R, GATHER
                )
                block += 1
            sum_of_query = gl.sum(total, 0)
            safe = gl.where(sum_of_query > 0, sum_of_query, 1.0)
            mbarrier.wait(smem.last_empty, (pieces & 1) ^ 1)
            smem.last.store(cache_scale / safe)
            mbarrier.arrive(smem.last_full, count=1)
            pieces += 1
            query_lse = gl.where(sum_of_query > 0, top + gl.log2(safe), float("-inf"))
            if slot < 0:
                r = token * N + row0 + i
                at_row = (r // N).to(gl.int64) * stride_lse_t + (r % N) * stride_lse_n
                gl.store(lse_ptr + at_row, query_lse * LN_2, mask=i < rows)
            else:
                gl.store(part_lse_ptr + slot * rows_per_slot + row0 + i, query_lse, mask=i < rows)


@gluon.jit
def _accumulate_block(b, acc0, acc1, block, seq_len, smem, GATHER: gl.constexpr):
    """Add values times block `b`'s weights to the accumulators of the two halves of the latent."""
    query_lay: gl.constexpr = gl.SliceLayout(0, acc0.type.layout)
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    stage, phase, _ = ring(block)
    wait_for_values(b, block, stage, phase, seq_len, smem, GATHER)
    if gl.max(smem.grew.load(flag_lay), 0) > 0:
        rescale = smem.factor.load(query_lay)[None, :]
        acc0 = acc0 * rescale
        acc1 = acc1 * rescale
    acc0 = warpgroup_mma(smem.k.index(2 * stage).permute((1, 0)), smem.weight, acc0, is_async=True)
    acc1 = warpgroup_mma(smem.k.index(2 * stage + 1).permute((1, 0)), smem.weight, acc1, is_async=True)
    return release_values(acc0, acc1, stage, smem)


@gluon.jit
def _store(
    acc, ptr, row0, rows, token, stride_t, stride_n, N: gl.constexpr, F: gl.constexpr, IN_16_BYTES: gl.constexpr
):  # fmt: skip
    """Write a [256, F] accumulator's columns that are queries, 16 bytes a thread: a warp fills whole sectors of the
    target's rows. Row r of the target is token + r // N and head r % N."""
    lay: gl.constexpr = gl.BlockedLayout([IN_16_BYTES, 1], [32, 1], [8 // IN_16_BYTES, IN_16_BYTES], [0, 1])
    i = gl.arange(0, F, gl.SliceLayout(0, lay))
    r = token * N + row0 + i
    at_row = (r // N).to(gl.int64) * stride_t + (r % N).to(gl.int64) * stride_n
    pointer = ptr + at_row[None, :] + gl.arange(0, HALF, gl.SliceLayout(1, lay))[:, None]
    gl.store(pointer, gl.convert_layout(acc, lay).to(ptr.dtype.element_ty), mask=(i < rows)[None, :])


@gluon.jit
def accumulate(
    out, work, smem, N: gl.constexpr, F: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr
):  # fmt: skip
    """Two warpgroups: values times weights. Each holds half of the rows of either half of the output."""
    out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot = out
    shared, lengths = work
    row0 = gl.program_id(0) * F
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, F, 16])
    query_lay: gl.constexpr = gl.SliceLayout(0, o_lay)
    in_16_bytes: gl.constexpr = 4 if F == 16 else 8  # of float32 4, but with 32 queries that takes registers
    block = 0
    pieces = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, _, rows, slot, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0
        )
        if rows > 0:
            acc0 = gl.zeros([HALF, F], gl.float32, o_lay)
            acc1 = gl.zeros([HALF, F], gl.float32, o_lay)
            for b in range(begin, end):
                acc0, acc1 = _accumulate_block(b, acc0, acc1, block, seq_len, smem, GATHER)
                block += 1
            mbarrier.wait(smem.last_full, pieces & 1)
            last = smem.last.load(query_lay)[None, :]
            mbarrier.arrive(smem.last_empty, count=1)
            pieces += 1
            acc0 = acc0 * last
            acc1 = acc1 * last
            if slot < 0:
                _store(acc0, out_ptr, row0, rows, token, stride_out_t, stride_out_n, N, F, 8)
                _store(acc1, out_ptr + HALF, row0, rows, token, stride_out_t, stride_out_n, N, F, 8)
            else:
                _store(acc0, part_ptr, row0, rows, slot * rows_per_slot, LATENT, 0, 1, F, in_16_bytes)
                _store(acc1, part_ptr + HALF, row0, rows, slot * rows_per_slot, LATENT, 0, 1, F, in_16_bytes)
