"""The roles of the Hopper prefill kernel: who hands out tiles and copies, who multiplies.

  load     one warp: claims tiles, tells the others, copies queries, keys and values by TMA, always running ahead
  attend   two warpgroups, each 64 of a tile's 128 queries: scores, online softmax, weights times values, output

A tile is 128 query rows of one head of one request. Its blocks of keys are taken from the last to the first, so that
masks and the end of the request concern the first ones alone. A stage is one of two blocks in shared memory; keys and
values of a block have barriers of their own, since keys are needed earlier and released earlier.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_kernels.hopper import barrier, ring, tma_load, uniform
from mla_kernels.primitives import LN_2

ROWS = gl.constexpr(64)  # queries of a warpgroup: what one matrix instruction takes
TILE_ROWS = gl.constexpr(128)
COLUMNS = gl.constexpr(64)  # of a TMA box: as many as its swizzle takes. Queries and keys lie in parts this wide
NOTHING = gl.constexpr(-3e38)  # largest score of a row that has seen no key: finite, so that differences are numbers
FIELDS = gl.constexpr(8)
GROUP = gl.constexpr(32)  # requests looked at at once


class Shared(NamedTuple):
    """What the roles share: buffers, and barriers that say when they are full or empty. C is parts of 64 columns."""

    q: object  # [2 * C, 64, 64], for each warpgroup its queries
    k: object  # [2 * C, BLOCK, 64], for each stage keys, the rotary part last
    v: object  # [2, BLOCK, V]
    tile: object  # [2 * FIELDS, 1], two tiles as (rows, token, head, blocks, sees, keys)
    q_full: object  # of each of the two below
    q_empty: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object
    tile_full: object
    turn: object  # of each warpgroup, to start matrix products


class Batch(NamedTuple):
    """Where requests begin, and the counter that tiles are claimed from."""

    query_start: object
    key_start: object
    size: object  # requests
    heads: object
    claimed: object
    group_keys: object  # keys of all heads whose tiles run side by side, so that they fit in L2


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tile_ends(first, batch):
    """Tiles of requests first .. first + i together, for i below GROUP."""
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    request = first + gl.arange(0, GROUP, lay)
    real = request < batch.size
    begin = gl.load(batch.query_start + request, mask=real, other=0).to(gl.int32)
    end = gl.load(batch.query_start + request + 1, mask=real, other=0).to(gl.int32)
    return gl.associative_scan((end - begin + TILE_ROWS - 1) // TILE_ROWS * batch.heads, 0, _add)


@gluon.jit
def _find(index, first, before, ends, batch):
    """(request, which of its tiles, first, before, ends) of the index-th tile; no request when there are fewer, and
    then `before` and the last of `ends` are how many there are.

    first, before, ends: a request to start at, a multiple of GROUP, tiles that come before it, and _tile_ends from it.
    """
    while (index >= before + gl.max(ends, 0)) & (first + GROUP < batch.size):
        before += gl.max(ends, 0)
        first += GROUP
        ends = _tile_ends(first, batch)
    local = index - before
    over = ends <= local
    request = first + gl.sum(over.to(gl.int32), 0)
    return request, local - gl.max(gl.where(over, ends, 0), 0), first, before, ends


@gluon.jit
def _order(local, tiles, keys, batch):
    """(tile, head) of a request's local-th tile: the tiles of a group of heads together, since L2 holds their keys, and
    in it the last, which sees most keys, first."""
    group = gl.minimum(gl.maximum(batch.group_keys // gl.maximum(keys, 1), 1), batch.heads)
    head = local // (tiles * group) * group
    local -= head * tiles
    group = gl.minimum(group, batch.heads - head)
    return tiles - 1 - local // group, head + local % group


@gluon.jit
def _tell(smem, count, rows, token, head, blocks, sees, keys):
    """Hand the count-th tile to the warpgroups; one of no rows is the end.

    The one before the last need not be waited for: its queries have been released, after it was read.
    """
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    fields = (rows, token, head, blocks, sees, keys)
    slot, _, _ = ring(count)
    for f in gl.static_range(6):
        smem.tile.index(slot * FIELDS + f).store(gl.full([1], 0, gl.int32, lay) + fields[f])
    mbarrier.arrive(smem.tile_full.index(slot), count=1)


@gluon.jit
def _told(smem, slot, field: gl.constexpr):
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return uniform(gl.max(smem.tile.index(slot * FIELDS + field).load(lay), 0))


@gluon.jit
def _load_q(q_desc, token, column, count, smem, C: gl.constexpr):
    for w in gl.static_range(2):
        full = smem.q_full.index(w)
        mbarrier.wait(smem.q_empty.index(w), (count & 1) ^ 1)
        mbarrier.expect(full, C * ROWS * COLUMNS * 2)
        for c in gl.static_range(C):
            tma_load(q_desc, [token + w * ROWS, column + c * COLUMNS], full, smem.q.index(w * C + c))


@gluon.jit
def _load_k(keys, row, head, block, smem, C: gl.constexpr, R: gl.constexpr, BLOCK: gl.constexpr):
    nope_desc, rope_desc, nope_stride, rope_stride = keys
    NOPE: gl.constexpr = C - R // COLUMNS
    stage, phase, _ = ring(block)
    full = smem.k_full.index(stage)
    mbarrier.wait(smem.k_empty.index(stage), phase ^ 1)
    mbarrier.expect(full, C * BLOCK * COLUMNS * 2)
    for c in gl.static_range(C):
        if c < NOPE:
            tma_load(nope_desc, [row, head * nope_stride + c * COLUMNS], full, smem.k.index(stage * C + c))
        else:
            column = head * rope_stride + (c - NOPE) * COLUMNS
            tma_load(rope_desc, [row, column], full, smem.k.index(stage * C + c))


@gluon.jit
def _load_v(values, row, head, block, smem, V: gl.constexpr, BLOCK: gl.constexpr):
    desc, stride = values
    stage, phase, _ = ring(block)
    full = smem.v_full.index(stage)
    mbarrier.wait(smem.v_empty.index(stage), phase ^ 1)
    mbarrier.expect(full, BLOCK * V * 2)
    tma_load(desc, [row, head * stride], full, smem.v.index(stage))


@gluon.jit
def _load_nothing(block, count, smem):
    """Say that keys and queries are there, for the products that the warpgroups start after their last tile."""
    stage, phase, _ = ring(block)
    mbarrier.wait(smem.k_empty.index(stage), phase ^ 1)
    mbarrier.arrive(smem.k_full.index(stage), count=1)
    for w in gl.static_range(2):
        mbarrier.wait(smem.q_empty.index(w), (count & 1) ^ 1)
        mbarrier.arrive(smem.q_full.index(w), count=1)


@gluon.jit
def load(
    queries, keys, values, batch, smem,
    C: gl.constexpr, R: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warp: claims tiles until there are no more, and fills the buffers.

    The first tile is the program's own number; others are claimed shortly before they are needed, so that programs
    which are ahead take more.
    """
    q_desc, q_stride = queries
    first = 0
    before = 0
    block = 0
    count = 0
    request, local, first, before, ends = _find(gl.program_id(0), first, before, _tile_ends(first, batch), batch)
    while request < batch.size:
        first_query = gl.load(batch.query_start + request).to(gl.int32)
        first_key = gl.load(batch.key_start + request).to(gl.int32)
        num_queries = gl.load(batch.query_start + request + 1).to(gl.int32) - first_query
        num_keys = gl.load(batch.key_start + request + 1).to(gl.int32) - first_key
        tile, head = _order(local, (num_queries + TILE_ROWS - 1) // TILE_ROWS, num_keys, batch)
        row = tile * TILE_ROWS
        rows = gl.minimum(num_queries - row, TILE_ROWS)
        sees = num_keys
        last = num_keys
        if CAUSAL:  # queries are the last tokens of their keys
            sees = num_keys - num_queries + row + 1
            last = sees + rows - 1
        blocks = gl.maximum((last + BLOCK - 1) // BLOCK, 1)  # one that nobody sees is as good as none, and simpler
        _tell(smem, count, rows, first_query + row, head, blocks, sees, num_keys)

        at = first_key + (blocks - 1) * BLOCK
        _load_k(keys, at, head, block, smem, C, R, BLOCK)
        _load_q(q_desc, first_query + row, head * q_stride, count, smem, C)
        for b in range(1, blocks):
            _load_k(keys, at - b * BLOCK, head, block + b, smem, C, R, BLOCK)
            _load_v(values, at - (b - 1) * BLOCK, head, block + b - 1, smem, V, BLOCK)
        # Before the last values, which are needed last: the next tile is found while others are multiplied.
        claim = gl.atomic_add(batch.claimed, 1, sem="relaxed")
        request, local, first, before, ends = _find(claim + gl.num_programs(0), first, before, ends, batch)
        _load_v(values, first_key, head, block + blocks - 1, smem, V, BLOCK)
        block += blocks
        count += 1
    _tell(smem, count, 0, 0, 0, 0, 0, 0)
    _load_nothing(block, count, smem)


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
    WIDE: gl.constexpr = _wide(V)
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
