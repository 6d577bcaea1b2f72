"""The roles of the Hopper decode kernel for few query rows: everything transposed.

A matrix instruction takes 64 rows. Where queries are 16 or 32, these are better keys, and queries its columns:

  load_keys or gather_keys   fills k, half a block at a time, when it is empty
  attend                     k times query: scores [64 keys, F queries]; softmax weights into `weight`
  accumulate                 output [512, F] += latent part of k, transposed, times weight

So a block takes a quarter or half of the time on the tensor cores that it takes with queries as rows, and accumulators
fit registers with room to spare. Pieces, barriers and names are those of hopper_decode.py; F is 16 or 32, with fixed
splits 64 too. `attend` serves an fp8 cache with one scale as well, whose other roles are in hopper_codes.py.

With fixed splits a query has the same bits in tiles of every width and at every place in them. An element of a matrix
instruction's result is a sum over k in an order that is its own: neither its place nor the other columns are in it, nor
how many there are. Sums and maxima over keys go over the same threads in the same order whatever F is. All else is
done to each query alone, multiply-adds by name, but for one thing: outputs of all queries are multiplied with factors
if any query's reference has moved, and of those that have not the factor is exp2(0), which is 1.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_kernels.hopper import barrier, ring, uniform
from mla_kernels.hopper_codes import scores as scores_of_codes
from mla_kernels.hopper_columns import store
from mla_kernels.hopper_decode import LAZY, NOTHING, finish_piece, release_values, scale_of, wait_for_values, write_plan
from mla_kernels.hopper_load import HALF, LATENT, load_q
from mla_kernels.hopper_shrink import shrink_q
from mla_kernels.schedule import BLOCK, first_slot, piece


@gluon.jit
def _scores(block, q_s, q_rope_s, smem, F: gl.constexpr, R: gl.constexpr, GATHER: gl.constexpr):
    """Keys of the block times queries, [64 keys, F queries], without any scale."""
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
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
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _attend_block(
    b, begin, top, total, block, seen, row0, scale_log2, q_s, q_rope_s, smem,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, GATHER: gl.constexpr, CODES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and softmax weights of block `b`, or of the step from it on. Returns the queries' references, and sums of
    weights that no thread has added to another's yet.

    seen: (position of the request's first query token, end of the piece in tokens, tokens that all queries see).
    The reference may lag behind the largest score by LAZY, as in hopper_decode.py.
    """
    KEYS: gl.constexpr = max(CODES, 1) * BLOCK
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [KEYS // 16, 1], [16, F, 16])
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [KEYS // 16], [0])
    if CODES > 0:
        s = scores_of_codes(block, q_s, q_rope_s, smem, KEYS, F, R, STAGES)
    else:
        s = _scores(block, q_s, q_rope_s, smem, F, R, GATHER)
    first_query, known, all_see = seen
    if b * BLOCK + KEYS > all_see:
        position = b * BLOCK + gl.arange(0, KEYS, gl.SliceLayout(1, s_lay))
        # Computed here, from a zero that the compiler cannot see: the loop has no registers for it.
        row = row0 + (uniform(block) >> 30) + gl.arange(0, F, gl.SliceLayout(0, s_lay))
        sees = gl.minimum(first_query + row // N, known - 1)  # position of the last key that the query may see
        s = gl.where(position[:, None] <= sees[None, :], s, float("-inf"))
    above = gl.fma(s, scale_log2, -top[None, :])
    weight = gl.exp2(above)
    grew = 1
    if b > begin:
        grew = gl.max((above > LAZY).to(gl.int32).reshape([KEYS * F]), 0)
    mbarrier.wait(smem.weight_empty, (block & 1) ^ 1)
    if grew > 0:
        largest = gl.max(s, 0)
        # Asked as above, to the last bit: whether a query's reference moves must not be up to the others of its tile.
        grows = gl.fma(largest, scale_log2, -top) > LAZY
        new_top = gl.where(grows, largest * scale_log2, top)
        rescale = gl.exp2(top - new_top)
        weight = gl.exp2(gl.fma(s, scale_log2, -new_top[None, :]))
        smem.factor.store(rescale)
        total = total * rescale[None, :]
        top = new_top
    smem.weight.store(weight.to(smem.weight.dtype))
    smem.grew.store(gl.full([1], 0, gl.int32, flag_lay) + grew)
    fence_async_shared()
    mbarrier.arrive(smem.weight_full, count=1)
    return top, total + weight


@gluon.jit
def _attend_piece(
    begin, end, slot, block, pieces, seen, scale_log2, cache_scale, q_s, q_rope_s, token, row0, rows, lse, smem,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, GATHER: gl.constexpr, CODES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Blocks `begin` to `end` from a fresh start, and their LSE. Returns how many blocks, or steps, and pieces were
    done."""
    STEP: gl.constexpr = max(CODES, 1)
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * STEP, 1], [16, F, 16])
    query_lay: gl.constexpr = gl.SliceLayout(0, s_lay)
    i = gl.arange(0, F, query_lay)
    top = gl.full([F], NOTHING, gl.float32, query_lay)
    total = gl.zeros([STEP * BLOCK, F], gl.float32, s_lay)
    for b in range(begin, end, STEP):
        top, total = _attend_block(
            b, begin, top, total, block, seen, row0, scale_log2, q_s, q_rope_s, smem, N, F, R, GATHER, CODES, STAGES
        )
        block += 1
    finish_piece(gl.sum(total, 0), top, cache_scale, i, slot, pieces, token, row0, rows, lse, smem, N)
    return block, pieces + 1


@gluon.jit
def attend(
    q, lse, plan, scale_log2, scale_ptr, work, smem,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr,
    CODES: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores, online softmax, weights for the others, and the LSE.

    CODES: blocks of a step, with a warpgroup for each, of an fp8 cache; all is in float16 then. 0 for any other.
    """
    q_s, q_rope_s = q[4], q[5]
    shared, lengths = work
    if SPLIT == 0:
        write_plan(plan, shared)
    row0 = gl.program_id(0) * F
    STEP: gl.constexpr = max(CODES, 1)
    q_lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4 * STEP, 1], [1, 0])
    cache_scale = scale_of(scale_ptr)
    block = 0
    pieces = 0
    line = first_slot(shared, SPLIT)
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, tokens, rows, slot, line = piece(
            request, shared, lengths, gl.program_id(1), row0, line, N, F, RAGGED, SPLIT
        )
        if rows > 0:
            load_q(q, token, row0, rows, N, F, R, q_lay)
            factor = scale_log2 * cache_scale
            if CODES > 0:
                factor *= shrink_q(q_s, q_rope_s, q[0].dtype.element_ty, F, R, 4 * STEP)
            fence_async_shared()
            barrier()
            known = gl.minimum(seq_len, end * BLOCK)  # what is behind a piece is another part's
            seen = (seq_len - tokens, known, gl.minimum(seq_len - tokens + 1, known))
            if SPLIT > 0:
                for split in range(begin, gl.maximum(end, begin + 1), SPLIT):  # one of no blocks if there is no key
                    block, pieces = _attend_piece(
                        split, gl.minimum(split + SPLIT, end), slot, block, pieces, seen, factor, cache_scale,
                        q_s, q_rope_s, token, row0, rows, lse, smem, N, F, R, GATHER, CODES, STAGES,
                    )  # fmt: skip
                    slot += 1
            else:
                block, pieces = _attend_piece(
                    begin, end, slot, block, pieces, seen, factor, cache_scale,
                    q_s, q_rope_s, token, row0, rows, lse, smem, N, F, R, GATHER, CODES, STAGES,
                )  # fmt: skip


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
def _accumulate_piece(
    begin, end, slot, block, pieces, seq_len, token, row0, rows, out, smem,
    N: gl.constexpr, F: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Blocks `begin` to `end` from a fresh start, and their outputs. Returns how many blocks and pieces were done."""
    out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot = out
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, F, 16])
    query_lay: gl.constexpr = gl.SliceLayout(0, o_lay)
    in_16_bytes: gl.constexpr = 4 if F == 16 else 8  # of float32 4, but with 32 queries that takes registers
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
        store(acc0, out_ptr, row0, rows, token, stride_out_t, stride_out_n, N, F, 8)
        store(acc1, out_ptr + HALF, row0, rows, token, stride_out_t, stride_out_n, N, F, 8)
    else:
        store(acc0, part_ptr, row0, rows, slot * rows_per_slot, LATENT, 0, 1, F, in_16_bytes)
        store(acc1, part_ptr + HALF, row0, rows, slot * rows_per_slot, LATENT, 0, 1, F, in_16_bytes)
    return block, pieces


@gluon.jit
def accumulate(
    out, work, smem, N: gl.constexpr, F: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """Two warpgroups: values times weights. Each holds half of the rows of either half of the output."""
    shared, lengths = work
    row0 = gl.program_id(0) * F
    block = 0
    pieces = 0
    line = first_slot(shared, SPLIT)
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, _, rows, slot, line = piece(
            request, shared, lengths, gl.program_id(1), row0, line, N, F, RAGGED, SPLIT
        )
        if rows > 0:
            if SPLIT > 0:
                for split in range(begin, gl.maximum(end, begin + 1), SPLIT):
                    block, pieces = _accumulate_piece(
                        split, gl.minimum(split + SPLIT, end), slot, block, pieces, seq_len, token, row0, rows, out,
                        smem, N, F, GATHER,
                    )  # fmt: skip
                    slot += 1
            else:
                block, pieces = _accumulate_piece(
                    begin, end, slot, block, pieces, seq_len, token, row0, rows, out, smem, N, F, GATHER
                )
