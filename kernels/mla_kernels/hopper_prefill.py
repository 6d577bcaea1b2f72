"""The other half of the roles of the Hopper prefill kernel: who multiplies.

  attend   two warpgroups, each 64 of a tile's 128 queries: scores, online softmax, weights times values, output

Tiles, and who copies what is multiplied here: hopper_prefill_load.py.
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
from mla_kernels.hopper_prefill_load import FIELDS, ROWS
from mla_kernels.primitives import LN_2

NOTHING = gl.constexpr(-3e38)  # largest score of a row that has seen no key: finite, so that differences are numbers


@gluon.jit
def _scores(block, smem, W: gl.constexpr, C: gl.constexpr, BLOCK: gl.constexpr):
    """Start multiplying the warpgroup's queries with a block of keys."""
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    stage, phase, zero = ring(block)
    mbarrier.wait(smem.k_full.index(stage), phase)
    s = gl.zeros([ROWS, BLOCK], gl.float32, lay)
    for c in gl.static_range(C):
        k = smem.k.index(stage * C + c).permute((1, 0))
        s = warpgroup_mma(smem.q.index(zero + W * C + c), k, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _weights(s, top, scale_log2):
    """Softmax weights of scores. Returns also the new largest scores, what older weights are to be multiplied with,
    and sums of weights, as far as a thread can add alone: [64, 4]."""
    high = gl.maximum(top, gl.max(s, 1) * scale_log2)
    rescale = gl.exp2(top - high)
    weight = gl.exp2(s * scale_log2 - high[:, None])
    sums = gl.sum(gl.sum(weight.reshape([ROWS, s.shape[1] // 8, 4, 2]), 3), 1)
    return weight, high, rescale, sums


@gluon.jit
def _hide(s, first, sees):
    """Scores with those of keys that a row does not see, `sees` and up, at -inf. The first column is key `first`."""
    key = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return gl.where(key[None, :] < sees[:, None], s, float("-inf"))


@gluon.jit
def _zero_tail(buffer, valid, BLOCK: gl.constexpr):
    """Zero the rows of a [BLOCK, V] buffer from `valid` on: they belong to nobody or to others, and 0 * NaN is NaN."""
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, lay))
    for u in gl.static_range(BLOCK // 16):
        if u * 16 + 16 > valid:
            part = buffer.slice(u * 16, 16, dim=0)
            part.store(gl.where((u * 16 + row < valid)[:, None], part.load(lay), 0.0))


@gluon.jit
def _lse_places(out, token, rows, head, row_lay: gl.constexpr):
    """(pointers, mask) of the LSE of 64 rows of a head."""
    lse_ptr, stride_t, stride_n = out[3], out[4], out[5]
    i = gl.arange(0, ROWS, row_lay)
    return lse_ptr + ((token + i).to(gl.int64) * stride_t + head * stride_n), i < rows


@gluon.constexpr_function
def _wide(v_width):
    """The output's layout, but with four neighbouring columns a thread: threads of a quad exchange what they hold, and
    sectors of 32 bytes are filled."""
    columns = [[0, 16 << i] for i in range((v_width // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *columns],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, v_width],
    )


@gluon.jit
def _out_places(out, token, rows, head, V: gl.constexpr, WIDE: gl.constexpr):
    """(pointers, mask) of the outputs of 64 rows of a head."""
    out_ptr, stride_t, stride_n = out[0], out[1], out[2]
    i = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    at = (token + i).to(gl.int64) * stride_t + head.to(gl.int64) * stride_n
    return out_ptr + at[:, None] + gl.arange(0, V, gl.SliceLayout(0, WIDE))[None, :], (i < rows)[:, None]


@gluon.jit
def _so_far(out, token, rows, head, V: gl.constexpr, WIDE: gl.constexpr, row_lay: gl.constexpr, o_lay: gl.constexpr):
    """The answer that is accumulated in, as the softmax's state: values, largest scores, and weights: 1, or 0 in rows
    that have seen no key, whose values do not count."""
    pointer, mask = _lse_places(out, token, rows, head, row_lay)
    lse = gl.load(pointer, mask=mask, other=float("-inf"))
    seen = lse > float("-inf")
    pointer, mask = _out_places(out, token, rows, head, V, WIDE)
    values = gl.convert_layout(gl.load(pointer, mask=mask, other=0.0), o_lay).to(gl.float32)
    values = gl.where(gl.convert_layout(seen, gl.SliceLayout(1, o_lay))[:, None], values, 0.0)
    return values, gl.where(seen, lse / LN_2, NOTHING), gl.where(seen, 1.0, 0.0)


@gluon.jit
def _store(acc, total, top, out, token, rows, head, V: gl.constexpr, WIDE: gl.constexpr):
    """Divide by the sums of weights, write outputs and LSE."""
    row_lay: gl.constexpr = top.type.layout  # by a name: Triton 3.6 takes no attribute as an argument
    total = gl.convert_layout(gl.sum(total, 1), row_lay)
    safe = gl.where(total > 0, total, 1.0)
    pointer, mask = _lse_places(out, token, rows, head, row_lay)
    gl.store(pointer, gl.where(total > 0, (top + gl.log2(safe)) * LN_2, float("-inf")), mask=mask)

    acc = acc * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, acc.type.layout))[:, None]
    pointer, mask = _out_places(out, token, rows, head, V, WIDE)
    gl.store(pointer, gl.convert_layout(acc.to(out[0].dtype.element_ty), WIDE), mask=mask)


@gluon.jit
def _told(smem, slot, field: gl.constexpr):
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return uniform(gl.max(smem.tile.index(slot * FIELDS + field).load(lay), 0))


@gluon.jit
def _next(smem, count):
    """(rows, token, head, blocks, sees, keys) of the count-th tile."""
    slot, phase, _ = ring(count)
    mbarrier.wait(smem.tile_full.index(slot), phase)
    rows = _told(smem, slot, 0)
    token = _told(smem, slot, 1)
    head = _told(smem, slot, 2)
    blocks = _told(smem, slot, 3)
    sees = _told(smem, slot, 4)
    keys = _told(smem, slot, 5)
    return rows, token, head, blocks, sees, keys


@gluon.jit
def attend(
    out, scale_log2, smem,
    W: gl.constexpr, C: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: attention of its 64 rows of every tile, as FlashAttention-3 does it (arXiv 2407.08608).

    Scores of a block are multiplied together with weights times values of the block before, and the two warpgroups take
    turns: while one has its softmax, the other has the tensor cores. The first scores of a tile are multiplied while
    outputs of the tile before are written. With ACCUMULATE the softmax of a tile begins with the answer so far, which
    takes no registers beyond those of its loop.
    """
    dtype: gl.constexpr = smem.v.dtype
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    p_lay: gl.constexpr = gl.DotOperandLayout(0, o_lay, 2)
    row_lay: gl.constexpr = gl.SliceLayout(1, s_lay)
    o_row_lay: gl.constexpr = gl.SliceLayout(1, o_lay)
    # What a quad of threads holds of a row fills a sector in float32 as it is.
    WIDE: gl.constexpr = o_lay if out[0].dtype.element_ty == gl.float32 else _wide(V)
    i = W * ROWS + gl.arange(0, ROWS, row_lay)
    block = 0
    count = 0
    turn = 0
    rows, token, head, blocks, all_see, keys = _next(smem, 0)
    mbarrier.wait(smem.q_full.index(W), 0)
    s = _scores(0, smem, W, C, BLOCK)
    while rows > 0:
        sees = gl.zeros([ROWS], gl.int32, row_lay) + keys
        if CAUSAL:
            sees = gl.minimum(all_see + i, keys)
            all_see = gl.minimum(all_see + W * ROWS, keys)
        begin = (blocks - 1) * BLOCK
        acc = gl.zeros([ROWS, V], gl.float32, o_lay)
        top = gl.full([ROWS], NOTHING, gl.float32, row_lay)
        seen = top
        if ACCUMULATE:
            acc, top, seen = _so_far(out, token + W * ROWS, rows - W * ROWS, head, V, WIDE, row_lay, o_lay)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(smem.k_empty.index(block & 1), count=1)
        if blocks == 1:
            mbarrier.arrive(smem.q_empty.index(W), count=1)
        if begin + BLOCK > all_see:
            s = _hide(s, begin, sees)
        weight, top, rescale, total = _weights(s, top, scale_log2)
        p = gl.convert_layout(weight.to(dtype), p_lay)
        if ACCUMULATE:
            # Four sums make a row's total: each gets a quarter.
            total += gl.convert_layout(seen * rescale * 0.25, gl.SliceLayout(1, total.type.layout))[:, None]
            acc = acc * gl.convert_layout(rescale, o_row_lay)[:, None]
        if begin + BLOCK > keys:
            stage, phase, _ = ring(block)
            mbarrier.wait(smem.v_full.index(stage), phase)
            _zero_tail(smem.v.index(stage), keys - begin, BLOCK)
            fence_async_shared()
            barrier()
        for b in range(1, blocks):
            stage, phase, _ = ring(block)
            begin -= BLOCK
            mbarrier.wait(smem.turn.index(W), (turn & 1) ^ (1 - W))
            turn += 1
            s = _scores(block + 1, smem, W, C, BLOCK)
            mbarrier.wait(smem.v_full.index(stage), phase)
            acc = warpgroup_mma(p, smem.v.index(stage), acc, is_async=True)
            mbarrier.arrive(smem.turn.index(1 - W), count=1)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(smem.k_empty.index(1 - stage), count=1)
            if b == blocks - 1:
                mbarrier.arrive(smem.q_empty.index(W), count=1)
            if begin + BLOCK > all_see:
                s = _hide(s, begin, sees)
            weight, top, rescale, sums = _weights(s, top, scale_log2)
            total = total * gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout))[:, None] + sums
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(smem.v_empty.index(stage), count=1)
            acc = acc * gl.convert_layout(rescale, o_row_lay)[:, None]
            p = gl.convert_layout(weight.to(dtype), p_lay)
            block += 1
        stage, phase, _ = ring(block)
        mbarrier.wait(smem.v_full.index(stage), phase)
        acc = warpgroup_mma(p, smem.v.index(stage), acc, is_async=True)
        block += 1
        count += 1
        next_rows, next_token, next_head, blocks, all_see, keys = _next(smem, count)
        mbarrier.wait(smem.q_full.index(W), count & 1)
        s = _scores(block, smem, W, C, BLOCK)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(smem.v_empty.index(stage), count=1)
        _store(acc, total, top, out, token + W * ROWS, rows - W * ROWS, head, V, WIDE)
        rows = next_rows
        token = next_token
        head = next_head
    warpgroup_mma_wait(0, deps=[s])
