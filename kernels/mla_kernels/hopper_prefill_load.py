"""Half of the roles of the Hopper prefill kernel: what its warps share, and the one that hands out tiles and copies.

  load     one warp: claims tiles, tells the others, copies queries, keys and values by TMA, always running ahead

The others are in hopper_prefill.py. A tile is 128 query rows of one head of one request. Its blocks of keys are taken
from the last to the first, so that masks and the end of the request concern the first ones alone. A stage is one of two
blocks in shared memory; keys and values of a block have barriers of their own, since keys are needed earlier and
released earlier.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mla_kernels.hopper import ring, tma_load

ROWS = gl.constexpr(64)  # queries of a warpgroup: what one matrix instruction takes
TILE_ROWS = gl.constexpr(128)
COLUMNS = gl.constexpr(64)  # of a TMA box: as many as its swizzle takes. Queries and keys lie in parts this wide
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
    pieces: object  # that a tile's keys are cut into
    tokens: object  # rows of a piece's answer


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
def _piece(piece, pieces, last, sees, keys, BLOCK: gl.constexpr):
    """(first key, keys from there on, sees, blocks) of a piece of a tile, as if no keys came before. `last`: how many
    keys the tile's last row sees. Pieces have as many blocks each; the last may have fewer, or one that nobody sees."""
    blocks = gl.maximum((last + BLOCK - 1) // BLOCK, 0)
    share = (blocks + pieces - 1) // pieces
    begin = gl.minimum(piece * share, blocks)
    first = begin * BLOCK
    return first, gl.maximum(keys - first, 0), sees - first, gl.maximum(gl.minimum(share, blocks - begin), 1)


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
    C: gl.constexpr, R: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """One warp: claims tiles until there are no more, and fills the buffers.

    The first tile is the program's own number; others are claimed shortly before they are needed, so that programs
    which are ahead take more. With CUT there is a program for each piece of each tile, and nothing to claim.
    """
    q_desc, q_stride = queries
    first = 0
    before = 0
    block = 0
    count = 0
    index = gl.program_id(0)
    if CUT:
        piece = index % batch.pieces
        index //= batch.pieces
    request, local, first, before, ends = _find(index, first, before, _tile_ends(first, batch), batch)
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
        answer = first_query + row
        if CUT:
            begin, num_keys, sees, blocks = _piece(piece, batch.pieces, last, sees, num_keys, BLOCK)
            first_key += begin
            answer += piece * batch.tokens
        _tell(smem, count, rows, answer, head, blocks, sees, num_keys)

        at = first_key + (blocks - 1) * BLOCK
        _load_k(keys, at, head, block, smem, C, R, BLOCK)
        _load_q(q_desc, first_query + row, head * q_stride, count, smem, C)
        for b in range(1, blocks):
            _load_k(keys, at - b * BLOCK, head, block + b, smem, C, R, BLOCK)
            _load_v(values, at - (b - 1) * BLOCK, head, block + b - 1, smem, V, BLOCK)
        if CUT:
            request = batch.size
        else:
            # Before the last values, which are needed last: the next tile is found while others are multiplied.
            claim = gl.atomic_add(batch.claimed, 1, sem="relaxed")
            request, local, first, before, ends = _find(claim + gl.num_programs(0), first, before, ends, batch)
        _load_v(values, first_key, head, block + blocks - 1, smem, V, BLOCK)
        block += blocks
        count += 1
    _tell(smem, count, 0, 0, 0, 0, 0, 0)
    _load_nothing(block, count, smem)
