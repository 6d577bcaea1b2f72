"""The role of Hopper decode that copies an fp8 cache's rows to shared memory: by TMA, or row by row.

A step is STEP blocks of 64 tokens. The last one of a piece may have fewer: what lies in the buffers behind those is
whatever was there before.

Of a cache with one scale rotary codes come with a row's second half. A tile-scaled row (cache_layout.PackedRow) brings
its scales with the first one; its rotary values have buffers of their own, ROPES of them, 0 where the scale is one.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from mla_kernels.hopper import cp_async, ring, tma_load
from mla_kernels.hopper_load import HALF, LATENT, TILE
from mla_kernels.schedule import BLOCK, piece

BOX = gl.constexpr(128)  # codes of a row that lie side by side in shared memory: all that a swizzled row has room for
SCALES = gl.constexpr(16)  # bytes of a tile-scaled row's scales, behind its latent; its rotary values are behind these
ROPE = gl.constexpr(2)  # in place of a half of rows: their rotary values


class TileCache(NamedTuple):
    """hopper_load.Cache of tile-scaled rows as int8, with one more TMA descriptor, for boxes of their scales."""

    desc: object
    scale_desc: object
    page_rows: object
    ptr: object
    stride8_page: object
    stride8_token: object
    table_ptr: object
    stride_table: object


@gluon.jit
def _copy_rows(
    cache, row, smem, stage, half: gl.constexpr, AT: gl.constexpr, ROWS: gl.constexpr, R: gl.constexpr,
    ROPES: gl.constexpr,
):  # fmt: skip
    """Start copying a half of ROWS rows, and what comes with it; what is beyond a row's end comes as 0."""
    if half == ROPE:
        target = smem.k_rope.index(stage).slice(AT, ROWS, dim=0)
        tma_load(cache.desc, [row, LATENT + SCALES], smem.rope_full.index(stage), target)
    else:
        ready = smem.k_full.index(2 * stage + half)
        target = smem.k.index(2 * stage + half).slice(AT, ROWS, dim=0)
        if half == 0 and ROPES > 0:
            tma_load(cache.scale_desc, [row, LATENT], ready, smem.k_scale.index(stage).slice(AT, ROWS, dim=0))
        for box in gl.static_range(HALF // BOX):
            tma_load(cache.desc, [row, half * HALF + box * BOX], ready, target.slice(box * BOX, BOX, dim=1))
        if half == 1 and R > 0 and ROPES == 0:
            tma_load(cache.desc, [row, LATENT], ready, smem.k_rope.index(stage).slice(AT, ROWS, dim=0))


@gluon.jit
def _copy_block(
    b, page, seq_len, table, cache, smem, stage,
    half: gl.constexpr, AT: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, ROPES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = min(PAGE, BLOCK)  # of a box
    row = page * cache.page_rows + (b * BLOCK) % PAGE
    for part in gl.static_range(BLOCK // ROWS):
        if PAGE < BLOCK:  # pages past the end are nobody's: take one that is there
            position = gl.minimum(b * BLOCK + part * ROWS, seq_len - 1)
            row = gl.load(table + position // PAGE) * cache.page_rows
        _copy_rows(cache, row, smem, stage, half, AT + part * ROWS, ROWS, R, ROPES)


@gluon.jit
def _copy_step(
    b, end, pages, step, seq_len, table, cache, smem,
    R: gl.constexpr, PAGE: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, ROPES: gl.constexpr,
):  # fmt: skip
    """Blocks b .. b + STEP - 1, as far as they are before `end`, once their buffers are free."""
    TILES: gl.constexpr = ROPES > 0
    FIRST: gl.constexpr = HALF + (SCALES if TILES else 0)
    SECOND: gl.constexpr = HALF + (BOX if R > 0 and not TILES else 0)
    whole = b + STEP <= end
    stage, phase, _ = ring(step, STAGES)
    for half in gl.static_range(2):
        mbarrier.wait(smem.k_empty.index(2 * stage + half), phase ^ 1)
        _expect(smem.k_full.index(2 * stage + half), whole, STEP, BLOCK * (SECOND if half > 0 else FIRST))
        for u in gl.static_range(STEP):
            if b + u < end:
                _copy_block(b + u, pages[u], seq_len, table, cache, smem, stage, half, u * BLOCK, R, PAGE, ROPES)
    if TILES and R > 0:
        place, turn, _ = ring(step, ROPES)
        if ROPES < STAGES:  # or else they are read when a half is empty
            mbarrier.wait(smem.rope_empty.index(place), turn ^ 1)
        _expect(smem.rope_full.index(place), whole, STEP, BLOCK * BOX)
        for u in gl.static_range(STEP):
            if b + u < end:
                _copy_block(b + u, pages[u], seq_len, table, cache, smem, place, ROPE, u * BLOCK, R, PAGE, ROPES)


@gluon.jit
def _expect(ready, whole, STEP: gl.constexpr, BYTES: gl.constexpr):
    """BYTES of each block of a step; if it is not whole of one."""
    if whole:
        mbarrier.expect(ready, STEP * BYTES)
    else:
        mbarrier.expect(ready, BYTES)


@gluon.jit
def _pages(b, end, table, PAGE: gl.constexpr, STEP: gl.constexpr):
    """Of a step's blocks; for one from `end` on the last one's."""
    first = gl.load(table + gl.minimum(b, end - 1) * BLOCK // PAGE)
    last = first
    if STEP == 2:
        last = gl.load(table + gl.minimum(b + 1, end - 1) * BLOCK // PAGE)
    return first, last


@gluon.jit
def load_codes(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, F: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, ROPES: gl.constexpr,
):  # fmt: skip
    """Codes of every block into the buffers, by TMA."""
    shared, lengths = work
    row0 = gl.program_id(0) * F
    step = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, _, _, _, _, _ = piece(request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0)
        table = cache.table_ptr + request.to(gl.int64) * cache.stride_table
        if begin < end:
            # Page numbers are read two steps ahead: nothing below waits for them.
            first0, last0 = _pages(begin, end, table, PAGE, STEP)
            first1, last1 = _pages(begin + STEP, end, table, PAGE, STEP)
            for b in range(begin, end, STEP):
                first2, last2 = _pages(b + 2 * STEP, end, table, PAGE, STEP)
                _copy_step(b, end, (first0, last0), step, seq_len, table, cache, smem, R, PAGE, STEP, STAGES, ROPES)
                first0, last0 = first1, last1
                first1, last1 = first2, last2
                step += 1


@gluon.jit
def gather_codes(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, F: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, ROPES: gl.constexpr,
):  # fmt: skip
    """The same row by row, for pages that no TMA box fits."""
    shared, lengths = work
    row0 = gl.program_id(0) * F
    lay: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    t = gl.arange(0, STEP * BLOCK, gl.SliceLayout(1, lay))
    c = gl.arange(0, HALF, gl.SliceLayout(0, lay))
    r = gl.arange(0, BOX, gl.SliceLayout(0, lay))
    x = gl.arange(0, SCALES, gl.SliceLayout(0, lay))
    step = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, _, _, _, _, _ = piece(request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0)
        table = cache.table_ptr + request.to(gl.int64) * cache.stride_table
        for b in range(begin, end, STEP):
            position = b * BLOCK + t
            real = position < gl.minimum(seq_len, end * BLOCK)
            page = gl.load(table + position // PAGE, mask=real, other=0).to(gl.int64)
            row = cache.ptr + (page * cache.stride8_page + (position % PAGE) * cache.stride8_token) * 16
            stage, phase, _ = ring(step, STAGES)
            for half in gl.static_range(2):
                mbarrier.wait(smem.k_empty.index(2 * stage + half), phase ^ 1)
                cp_async(smem.k.index(2 * stage + half), row[:, None] + (half * HALF + c)[None, :], mask=real[:, None])
                if half == 0 and ROPES > 0:
                    cp_async(smem.k_scale.index(stage), row[:, None] + (LATENT + x)[None, :], mask=real[:, None])
                if half == 1 and R > 0 and ROPES == 0:
                    here = real[:, None] & (r < TILE)[None, :]
                    cp_async(smem.k_rope.index(stage), row[:, None] + (LATENT + r)[None, :], mask=here)
                async_copy.mbarrier_arrive(smem.k_full.index(2 * stage + half), increment_count=False)
            if R > 0 and ROPES > 0:
                place, turn, _ = ring(step, ROPES)
                if ROPES < STAGES:
                    mbarrier.wait(smem.rope_empty.index(place), turn ^ 1)
                cp_async(smem.k_rope.index(place), row[:, None] + (LATENT + SCALES + r)[None, :], mask=real[:, None])
                async_copy.mbarrier_arrive(smem.rope_full.index(place), increment_count=False)
            step += 1
