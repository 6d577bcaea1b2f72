"""Cutting a batch's cache evenly over the GPU, on the device: the work of every program of a persistent decode kernel.

All requests' blocks of 64 tokens, one request after the other, are a line; part p of a launch works on blocks
[p * size, (p + 1) * size) of it. So a part has whole requests and at most two that were cut: one that it goes on with
and one that it begins. What it computes of those goes to slots 2 * part and 2 * part + 1 of the scratch, to be merged.
Scratch depends on the number of parts, not on the batch; a captured graph adapts to every batch. If there are parts
enough, as there are where few requests have many blocks each, requests are rounded up to whole parts: one that ends a
request and begins another would end after all others, for it fills its pipeline twice. Else requests of different
lengths have as much room before their first block as a piece takes time beside its blocks (FlashMLA's scheduler adds
five blocks a request), or a part of many short requests would end last.

With fixed splits (splits.py) the line is one of splits, of SPLIT blocks each, and a part takes a run of whole ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK = gl.constexpr(64)  # tokens of a block
CHUNK, FEW = gl.constexpr(128), gl.constexpr(32)  # requests looked at at once, and if there are not more than those
# Times in 1024ths of what a part needs for a block (measured on an H200): that any request is cut, so that there is
# something to merge, and a cut in every part: pipelines drain and fill, partial answers travel.
UNIT, MERGE, CUT = gl.constexpr(1024), gl.constexpr(1536), gl.constexpr(4096)
# Query rows of which partial answers take as long to write and read again as a part needs for a block.
ROWS_OF_A_BLOCK = gl.constexpr(1300.0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _add7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@gluon.jit
def _costs(seq_lens_ptr, query_start_ptr, first, batch, RAGGED: gl.constexpr, AT_ONCE: gl.constexpr):
    """(is a request, its blocks) of AT_ONCE requests. An empty one counts as a block: somebody must write its zeros."""
    lay: gl.constexpr = gl.BlockedLayout([AT_ONCE // 32], [32], [4], [0])  # every warp holds all: sums need no barrier
    r = first + gl.arange(0, AT_ONCE, lay)
    here = r < batch
    lens = gl.load(seq_lens_ptr + r, mask=here, other=0)
    if RAGGED:
        start = gl.load(query_start_ptr + r, mask=here, other=0)
        here = here & (gl.load(query_start_ptr + r + 1, mask=here, other=0) > start)
    return r < batch, gl.where(here, gl.maximum((lens + BLOCK - 1) // BLOCK, 1), 0)


@gluon.jit
def _ratio(x, y, reciprocal):
    """x // y of numbers that are not negative; `reciprocal` is 1 / y in float32, perhaps two units off.

    Divides what the first quotient leaves, then at most one is missing or too many. A dozen instructions; a division of
    integers is thirty, one after the other.
    """
    q = gl.floor(x * reciprocal).to(gl.int32)
    q += gl.floor((x - q * y) * reciprocal).to(gl.int32)
    q = gl.where((q + 1) * y <= x, q + 1, q)
    return gl.where(q * y > x, q - 1, q)


@gluon.jit
def _round_up(x, y):
    """The least q with q * y >= x."""
    return _ratio(x + y - 1, y, 1.0 / y)


@gluon.jit
def _part_size(total, longest, uniform, batch, parts, rows):
    """Blocks of a part: an even share, or somewhat more where that costs less than it saves."""
    size = gl.maximum(_round_up(total, parts), 1)
    # Pieces of a request write partial answers and read them again, 4 KiB a query row; the fewer the pieces the less.
    size = gl.maximum(size, gl.floor(gl.sqrt(total * (rows / ROWS_OF_A_BLOCK))).to(gl.int32))
    whole = _round_up(size, longest) * longest
    more = gl.minimum(whole - size, 64)  # as far as it matters, so that products fit an integer
    saves = more * UNIT * parts < MERGE * parts + CUT * gl.minimum(batch, parts)
    return gl.where(uniform & saves, whole, size)


@gluon.jit
def _found(real, cost, room, before, begin_of_part, end_of_part, size, reciprocal):
    """What some requests, the first of which begins at block `before`, add to the numbers that `share` is after.

    room: of a request's cost, what is before its first block.
    """
    end = before + gl.associative_scan(cost, 0, _add)
    start = end - gl.maximum(cost - room, 0)  # of its blocks
    passed = ((end <= begin_of_part) & real).to(gl.int32)
    done = ((end < end_of_part) & real).to(gl.int32)
    last = ((end >= end_of_part) & (start < end_of_part)).to(gl.int32)
    cut = ((_ratio(start, size, reciprocal) + 1) * size < end).to(gl.int32)
    return gl.reduce((passed, passed * cost, done, last * start, last * end, cut, cut * done), 0, _add7)


@gluon.jit
def _with_room(real, cost, room):
    """Costs with what is before the first block of each request that has one."""
    return gl.where(real & (cost > 0), cost + room, 0)


@gluon.jit
def share(seq_lens_ptr, query_start_ptr, batch, part, parts, rows, RAGGED: gl.constexpr, PIECE: gl.constexpr):
    """What part `part` of `parts` works on, computed by four warps.  rows: query rows of a request, at most.

    PIECE: blocks for which a part would need as long as for a request beside its blocks. Of 0 to 24 tried on an H200
        (2026-11-27, four uneven batches with 16 to 128 heads); tile-scaled rows have that of one scale.
    Returns (first request, its first block, last request, its end block, which may be beyond its last), and about cut
    requests: into how many parts the last one is cut if it begins here and goes on elsewhere (else 0), how many there
    are, and how many before the last one. No work: the last request is before the first.
    """
    room = 0
    if batch <= FEW:
        # Every program begins with this, and waits for each instruction: with a request a lane they are half as many.
        real, cost = _costs(seq_lens_ptr, query_start_ptr, 0, batch, RAGGED, FEW)
        total = gl.sum(cost, 0)
        longest = gl.maximum(gl.max(cost, 0), 1)
        uniform = total == batch * longest
        size = _part_size(total, longest, uniform, batch, parts, rows)
        if batch > 1:
            shares = _ratio(cost + size - 1, size, 1.0 / size)
            needed = gl.sum(shares, 0)
            if needed <= parts:
                # Every request begins with a part of its own: its last part is not full, and no part has two pieces.
                cost = shares * size
                total = needed * size
            else:
                room = gl.where(uniform, 0, PIECE)
                cost = _with_room(real, cost, room)
                total = gl.sum(cost, 0)
                size = _part_size(total, longest, uniform, batch, parts, rows)
        reciprocal = 1.0 / size
        begin_of_part = part * size
        end_of_part = gl.minimum(begin_of_part + size, total)
        first_request, blocks_passed, requests_done, last_start, last_end, cuts, cuts_before = _found(
            real, cost, room, 0, begin_of_part, end_of_part, size, reciprocal
        )
    else:
        total = 0
        longest = 1
        requests = 0
        for first in range(0, batch, CHUNK):
            _, cost = _costs(seq_lens_ptr, query_start_ptr, first, batch, RAGGED, CHUNK)
            total += gl.sum(cost, 0)
            longest = gl.maximum(longest, gl.max(cost, 0))
            requests += gl.sum((cost > 0).to(gl.int32), 0)
        uniform = total == batch * longest
        room = gl.where(uniform, 0, PIECE)
        total += requests * room
        size = _part_size(total, longest, uniform, batch, parts, rows)
        reciprocal = 1.0 / size
        begin_of_part = part * size
        end_of_part = gl.minimum(begin_of_part + size, total)
        before = 0
        first_request = 0
        blocks_passed = 0
        requests_done = 0
        last_start = 0
        last_end = 0
        cuts = 0
        cuts_before = 0
        for first in range(0, batch, CHUNK):
            real, cost = _costs(seq_lens_ptr, query_start_ptr, first, batch, RAGGED, CHUNK)
            cost = _with_room(real, cost, room)
            found = _found(real, cost, room, before, begin_of_part, end_of_part, size, reciprocal)
            first_request += found[0]
            blocks_passed += found[1]
            requests_done += found[2]
            last_start += found[3]
            last_end += found[4]
            cuts += found[5]
            cuts_before += found[6]
            if first + CHUNK < batch:
                before += gl.sum(cost, 0)
    first_block = gl.maximum(begin_of_part - blocks_passed - room, 0)
    last_request = requests_done
    end_block = end_of_part - last_start
    pieces = 0
    if begin_of_part >= total:
        last_request = first_request - 1
    elif last_end == 0:  # the part ends before the first block of a request
        last_request = requests_done - 1
        end_block = total
    elif (last_start >= begin_of_part) & (end_of_part < last_end):
        pieces = _ratio(last_end - 1, size, reciprocal) - part + 1
    return (first_request, first_block, last_request, end_block), pieces, cuts, cuts_before


@gluon.jit
def share_splits(seq_lens_ptr, batch, part, parts, turn, window, SPLIT: gl.constexpr):
    """As `share`, of the splits of a turn. Returns (first request, its first block, last request, its end block, which
    may be beyond its last, slot of the first split)."""
    lay: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    i = gl.arange(0, CHUNK, lay)
    before = 0
    begin_of_turn = 0
    end_of_turn = 0
    for first in range(0, batch, CHUNK):
        splits = _splits(seq_lens_ptr, first + i, batch, SPLIT)
        start = before + gl.associative_scan(splits, 0, _add) - splits
        begin_of_turn += gl.sum(gl.where(start < turn * window, splits, 0), 0)
        end_of_turn += gl.sum(gl.where(start < (turn + 1) * window, splits, 0), 0)
        before += gl.sum(splits, 0)
    size = gl.maximum(_round_up(end_of_turn - begin_of_turn, parts), 1)
    begin_of_part = begin_of_turn + part * size
    end_of_part = gl.minimum(begin_of_part + size, end_of_turn)
    before = 0
    first_request = 0
    first_split = begin_of_part
    last_request = 0
    end_split = end_of_part
    for first in range(0, batch, CHUNK):
        splits = _splits(seq_lens_ptr, first + i, batch, SPLIT)
        end = before + gl.associative_scan(splits, 0, _add)
        passed = (end <= begin_of_part) & (first + i < batch)
        done = (end < end_of_part) & (first + i < batch)
        first_request += gl.sum(passed.to(gl.int32), 0)
        first_split -= gl.sum(gl.where(passed, splits, 0), 0)
        last_request += gl.sum(done.to(gl.int32), 0)
        end_split -= gl.sum(gl.where(done, splits, 0), 0)
        before += gl.sum(splits, 0)
    if begin_of_part >= end_of_turn:
        last_request = first_request - 1
    return first_request, first_split * SPLIT, last_request, end_split * SPLIT, begin_of_part - turn * window


@gluon.jit
def _splits(seq_lens_ptr, request, batch, SPLIT: gl.constexpr):
    """Splits of some requests; an empty one has one, for somebody must write its zeros."""
    lens = gl.load(seq_lens_ptr + request, mask=request < batch, other=0)
    return gl.where(request < batch, gl.maximum((lens + SPLIT * BLOCK - 1) // (SPLIT * BLOCK), 1), 0)


@gluon.jit
def first_slot(shared, SPLIT: gl.constexpr):
    """Slot of the first split that a part has; nothing without fixed splits."""
    slot = 0
    if SPLIT > 0:
        slot = shared[4]
    return slot


@gluon.jit
def piece(
    request, shared, lengths, part, row0, line, N: gl.constexpr, ROWS: gl.constexpr, RAGGED: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """What part `part` has of a request, for the tile of ROWS query rows from `row0` on.

    lengths: (seq_lens_ptr, query_start_ptr, query_len).  N: heads; query row r is token r // N and head r % N.
    line: with fixed splits, slot of the first one that the part has of this request.
    Returns (first block, end block, cached tokens, first query token, query tokens, rows of the tile that are queries,
    slot of the first partial answer or -1, line of the next request).
    """
    first_request, first_block, last_request, end_block = shared[0], shared[1], shared[2], shared[3]
    seq_lens_ptr, query_start_ptr, query_len = lengths
    seq_len = gl.load(seq_lens_ptr + request)
    if RAGGED:
        token = gl.load(query_start_ptr + request)
        tokens = gl.load(query_start_ptr + request + 1) - token
    else:
        token = request * query_len
        tokens = query_len
    blocks = (seq_len + BLOCK - 1) // BLOCK
    cost = gl.maximum(blocks, 1)
    begin = gl.where(request == first_request, first_block, 0)
    end = gl.where(request == last_request, end_block, cost)
    if SPLIT > 0:
        slot = gl.where(cost > SPLIT, line, -1)
        line += (gl.minimum(end, cost) - begin + SPLIT - 1) // SPLIT
    else:
        slot = gl.where(begin > 0, 2 * part, gl.where(end < cost, 2 * part + 1, -1))
    rows = gl.minimum(gl.minimum(tokens, query_len) * N - row0, ROWS)  # more than announced have no scratch
    end = gl.where(rows > 0, gl.minimum(end, blocks), begin)
    return begin, end, seq_len, token, tokens, rows, slot, line
