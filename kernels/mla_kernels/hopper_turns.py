"""The roles of Hopper decode for an fp8 cache with one scale, 64 query rows a tile: two warpgroups that take turns.

Outputs of 64 queries fill half of the registers that there are. Here each warpgroup holds half of them, one half of the
latent, and takes the scores of every other block, so that the softmax of one is under products of the other (the
schedule of FlashMLA, whose queries are rows):

  load_codes, gather_codes   (hopper_codes_load.py) fill k with codes of a block, half a row at a time, when it is empty
  take_turns, twice          `scores` of its next block (hopper_codes.py); outputs += the other's block: its half of
                             values, transposed, times weights; softmax weights of its own block into `weight`; outputs
                             += its own block

`turn` is 0 or 1, which of the two; block k is warpgroup k % 2's. A block's softmax begins with the references that the
block before it left. A block's buffers are free when both halves are added: two blocks are in use, the third is on its
way. (With the products of both blocks behind the next scores three were in use, and a call took 182 us for 164.)
Weights of a block need no barrier that says they are empty: when a warpgroup has the other's next weights, the other is
done with these, and at the end of a piece they wait for each other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from mla_kernels.hopper import barrier, ring, uniform
from mla_kernels.hopper_codes import FIRST_PAIRS, LAST_PAIRS, add_columns, scores, words_of_tile
from mla_kernels.hopper_columns import rescale_sums, store_tile, thread_sums
from mla_kernels.hopper_decode import LAZY, scale_of, write_lse, write_plan
from mla_kernels.hopper_load import HALF, load_q
from mla_kernels.hopper_shared import QUERIES
from mla_kernels.hopper_shrink import shrink_q
from mla_kernels.schedule import BLOCK, piece

# Of scores and outputs: keys, or columns of the latent, by queries.
TILE_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
QUERY = gl.constexpr(gl.SliceLayout(0, TILE_LAYOUT))


@gluon.jit
def _largest_of_warps(x):
    """The largest value of a [64, 64] tile that each of four warps holds: first what a thread has, then across."""
    of_threads = gl.max(gl.max(gl.max(x.reshape([4, 2, 8, 8, 4, 2]), 5), 3), 1)
    return gl.max(gl.max(of_threads, 2), 1)


@gluon.jit
def _weigh(
    s, b, first, block, total, seen, row0, scale_log2, smem, turn: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """Softmax weights of scores `s` of block `b`, for both. Returns sums of this warpgroup's weights so far.

    first: whether the piece begins with it.   seen: (position of the request's first query token, tokens that its last
    one sees).   References may lag behind the largest score by LAZY, as in hopper_decode.py;
    that of a query that has seen no key is 0. Whether one has to move is known only when weights are written already:
    then they are written again.
    """
    first_query, seq_len = seen
    if first:
        smem.minus_top.store(gl.full([QUERIES], 0, gl.float32, QUERY))
    if (b + 1) * BLOCK > first_query + 1:
        position = b * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, TILE_LAYOUT))
        # Computed here, from a zero that the compiler cannot see: the loop has no registers for it.
        row = row0 + (uniform(block) >> 30) + gl.arange(0, QUERIES, QUERY)
        sees = gl.minimum(first_query + row // N, seq_len - 1)  # position of the last key that the query may see
        s = gl.where(position[:, None] <= sees[None, :], s, float("-inf"))
    s = gl.fma(s, scale_log2, smem.minus_top.load(QUERY)[None, :])
    weight = gl.exp2(s)
    sums = thread_sums(weight, BLOCK, QUERIES)
    smem.above.index(turn).store(_largest_of_warps(s))
    smem.weight.index(turn).store(weight.to(gl.float16))
    fence_async_shared()
    if first | _outgrown(smem, turn):
        largest = gl.max(s, 0)
        by = gl.where((largest > LAZY) | (first & (largest > float("-inf"))), largest, 0.0)
        smem.factor.index(turn).store(gl.exp2(-gl.maximum(by, 0.0)))  # in the first block there is nothing to multiply
        smem.minus_top.store(smem.minus_top.load(QUERY) - by)
        weight = gl.exp2(s - by[None, :])
        sums = thread_sums(weight, BLOCK, QUERIES)
        total = rescale_sums(total, smem.factor.index(turn).load(QUERY))
        smem.weight.index(turn).store(weight.to(gl.float16))
        fence_async_shared()
    mbarrier.arrive(smem.weight_full.index(turn), count=1)
    return total + sums


@gluon.jit
def _outgrown(smem, whose):
    """Whether a score of a block is too far above its reference."""
    return gl.max(smem.above.index(whose).load(gl.BlockedLayout([4], [32], [4], [0])), 0) > LAZY


@gluon.jit
def _add_block(b, block, acc, total, seq_len, smem, turn: gl.constexpr, OWN: gl.constexpr, STAGES: gl.constexpr):
    """Add values of this warpgroup's half of block `b`, its own or the other's, times weights. Returns outputs, and
    sums of weights, which the other's block may have rescaled."""
    acc0, acc1, acc2, acc3 = acc
    stage, phase, _ = ring(block, STAGES)
    whose = uniform(block) & 1  # which is known, but as a constant it costs registers
    values = smem.k.index(2 * stage + turn)
    if not OWN:
        mbarrier.wait(smem.k_full.index(2 * stage + turn), phase)
    words = words_of_tile(b, 0, 0, values, seq_len, BLOCK, BLOCK)
    if not OWN:
        mbarrier.wait(smem.weight_full.index(whose), (block >> 1) & 1)
    if _outgrown(smem, whose):
        rescale = smem.factor.index(whose).load(QUERY)
        acc0 = acc0 * rescale[None, :]
        acc1 = acc1 * rescale[None, :]
        acc2 = acc2 * rescale[None, :]
        acc3 = acc3 * rescale[None, :]
        if not OWN:
            total = rescale_sums(total, rescale)
    weight = smem.weight.index(whose)
    acc0 = add_columns(acc0, words, weight, FIRST_PAIRS, 4, QUERIES)
    acc1 = add_columns(acc1, words, weight, LAST_PAIRS, 4, QUERIES)
    words = words_of_tile(b, 0, 1, values, seq_len, BLOCK, BLOCK)
    acc0, acc1 = warpgroup_mma_wait(1, deps=[acc0, acc1])
    acc2 = add_columns(acc2, words, weight, FIRST_PAIRS, 4, QUERIES)
    acc1, acc2 = warpgroup_mma_wait(1, deps=[acc1, acc2])
    acc3 = add_columns(acc3, words, weight, LAST_PAIRS, 4, QUERIES)
    mbarrier.arrive(smem.k_empty.index(2 * stage + turn), count=1)
    return warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, acc3]), total


@gluon.jit
def _take_q(q, token, row0, rows, smem, N: gl.constexpr, R: gl.constexpr):
    """Queries of a piece for both warpgroups, as float16."""
    load_q(q, token, row0, rows, N, QUERIES, R, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    power = shrink_q(q[4], q[5], q[0].dtype.element_ty, QUERIES, R, 4)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    smem.power.store(gl.full([1], 0, gl.float32, one) + power)
    fence_async_shared()
    barrier()
    mbarrier.arrive(smem.q_full, count=1)


@gluon.jit
def _sum_of_both(total, pieces, smem, turn: gl.constexpr):
    """Sums of both warpgroups' weights of a piece, [64 queries]. Either may be a piece ahead of the other's reading."""
    own = gl.convert_layout(gl.sum(gl.sum(total, 1), 0), QUERY)  # within warps first
    buffer = 2 * (pieces & 1)
    smem.sums.index(buffer + turn).store(own)
    mbarrier.arrive(smem.sums_full.index(buffer + turn), count=1)
    mbarrier.wait(smem.sums_full.index(buffer + 1 - turn), (pieces >> 1) & 1)
    first, second = smem.sums.index(buffer).load(QUERY), smem.sums.index(buffer + 1).load(QUERY)
    return first + second  # in both warpgroups the same


@gluon.jit
def take_turns(
    q, lse, plan, out, scale_log2, scale_ptr, work, smem,
    turn: gl.constexpr, N: gl.constexpr, R: gl.constexpr, RAGGED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup of the two: scores and weights of its blocks, its half of outputs. The first loads queries and
    writes the LSE."""
    shared, lengths = work
    if turn == 0:
        write_plan(plan, shared)
    row0 = gl.program_id(0) * QUERIES
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    cache_scale = scale_of(scale_ptr)
    block = 0
    pieces = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, tokens, rows, slot, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, QUERIES, RAGGED, 0
        )
        if rows > 0:
            if turn == 0:
                _take_q(q, token, row0, rows, smem, N, R)
            mbarrier.wait(smem.q_full, pieces & 1)
            factor = scale_log2 * cache_scale * gl.max(smem.power.load(one), 0)
            seen = (seq_len - tokens, seq_len)
            total = thread_sums(gl.zeros([BLOCK, QUERIES], gl.float32, TILE_LAYOUT), BLOCK, QUERIES)
            nothing = gl.zeros([HALF // 4, QUERIES], gl.float32, TILE_LAYOUT)
            acc = nothing, nothing, nothing, nothing
            before = block - begin
            added = begin
            for b in range(begin + ((block & 1) ^ turn), end, 2):
                s = scores(before + b, q[4], q[5], smem, BLOCK, QUERIES, R, STAGES)
                if b > begin:
                    acc, total = _add_block(b - 1, before + b - 1, acc, total, seq_len, smem, turn, False, STAGES)
                total = _weigh(s, b, b == begin, before + b, total, seen, row0, factor, smem, turn, N)
                acc, total = _add_block(b, before + b, acc, total, seq_len, smem, turn, True, STAGES)
                added = b + 1
            if added < end:
                acc, total = _add_block(added, before + added, acc, total, seq_len, smem, turn, False, STAGES)
            block += end - begin
            top = -smem.minus_top.load(QUERY)
            sum_of_query = _sum_of_both(total, pieces, smem, turn)
            pieces += 1
            safe = gl.where(sum_of_query > 0, sum_of_query, 1.0)
            if turn == 0:
                write_lse(sum_of_query, top, gl.arange(0, QUERIES, QUERY), slot, token, row0, rows, lse, N)
            last = (cache_scale / safe)[None, :]
            acc0, acc1, acc2, acc3 = acc
            column = turn * HALF
            store_tile(acc0 * last, acc1 * last, column, slot, out, row0, rows, token, N, QUERIES)
            store_tile(acc2 * last, acc3 * last, column + HALF // 2, slot, out, row0, rows, token, N, QUERIES)
