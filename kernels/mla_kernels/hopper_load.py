"""The role of Hopper decode kernels that copies cache rows into shared memory: by TMA, or row by row.

Those of an fp8 cache: hopper_codes_load.py, and hopper_unpack.py for tile-scaled rows and many queries.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from mla_kernels.hopper import SWIZZLED, cp_async, reinterpret, ring, tma_load
from mla_kernels.schedule import BLOCK, piece

LATENT, HALF, TILE = gl.constexpr(512), gl.constexpr(256), gl.constexpr(64)  # columns: of a row, a buffer, a TMA box


class Cache(NamedTuple):
    """The paged cache: as a TMA descriptor of rows, or as a pointer with strides in 16 bytes.

    An fp8 cache is a pointer to codes with one scale, as int8, or to words of tile-scaled rows.
    """

    desc: object
    page_rows: object
    ptr: object
    stride8_page: object
    stride8_token: object
    table_ptr: object
    stride_table: object


@gluon.jit
def _copy_q(
    target, q_ptr, strides8, token, row0, rows, column,
    N: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start copying columns column .. column + WIDTH - 1 of a tile of ROWS query rows, in layout LAYOUT."""
    c = column + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    i = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    r = token * N + row0 + i
    offset = ((r // N).to(gl.int64) * strides8[0] + (r % N).to(gl.int64) * strides8[1]) * 8
    cp_async(target, q_ptr + offset[:, None] + c[None, :], mask=(i < rows)[:, None])


@gluon.jit
def load_q(q, token, row0, rows, N: gl.constexpr, ROWS: gl.constexpr, R: gl.constexpr, LAYOUT: gl.constexpr):
    """Copy a tile of ROWS query rows, as they are, to their buffers.   q: (pointers and strides of 8 elements of the
    latent and the rotary part, buffers of both)."""
    q_latent_ptr, q_rope_ptr, latent_strides8, rope_strides8, q_s, q_rope_s = q
    raw = reinterpret(q_s, q_latent_ptr.dtype.element_ty, [2, ROWS, HALF], SWIZZLED)
    for half in gl.static_range(2):
        _copy_q(raw.index(half), q_latent_ptr, latent_strides8, token, row0, rows, half * HALF, N, ROWS, HALF, LAYOUT)
    if R > 0:
        raw_rope = reinterpret(q_rope_s, q_latent_ptr.dtype.element_ty, [ROWS, TILE], SWIZZLED)
        _copy_q(raw_rope, q_rope_ptr, rope_strides8, token, row0, rows, 0, N, ROWS, TILE, LAYOUT)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _load_block(b, page, block, seq_len, table, cache, smem, R: gl.constexpr, PAGE: gl.constexpr):
    """Copy a block's cache rows by TMA, once its two halves are free."""
    BOX: gl.constexpr = min(PAGE, 64)
    BOXES: gl.constexpr = 64 // min(PAGE, 64)
    stage, phase, _ = ring(block)
    for half in gl.static_range(2):
        ready = smem.k_full.index(2 * stage + half)
        mbarrier.wait(smem.k_empty.index(2 * stage + half), phase ^ 1)
        mbarrier.expect(ready, 64 * 256 * 2 + (64 * 64 * 2 if half == 1 and R > 0 else 0))
        for u in gl.static_range(BOXES):
            row = page * cache.page_rows + (b * BLOCK) % PAGE
            if BOXES > 1:  # pages past the end are nobody's: take one that is there
                row = gl.load(table + gl.minimum(b * BLOCK + u * BOX, seq_len - 1) // PAGE) * cache.page_rows
            for c in gl.static_range(4):
                target = smem.k.index(2 * stage + half).slice(c * TILE, TILE, dim=1)
                if BOXES > 1:
                    target = target.slice(u * BOX, BOX, dim=0)
                tma_load(cache.desc, [row, half * HALF + c * TILE], ready, target)
            if half == 1 and R > 0:
                target = smem.k_rope.index(stage)
                if BOXES > 1:
                    target = target.slice(u * BOX, BOX, dim=0)
                tma_load(cache.desc, [row, LATENT], ready, target)


@gluon.jit
def load_keys(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One warp: cache rows of every block into the buffers, by TMA."""
    shared, lengths = work
    row0 = gl.program_id(0) * ROWS
    block = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, _, _, _, _, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, ROWS, RAGGED, 0
        )
        table = cache.table_ptr + request.to(gl.int64) * cache.stride_table
        if begin < end:
            # Page numbers are read two blocks ahead: nothing below waits for them.
            page0 = gl.load(table + begin * BLOCK // PAGE)
            page1 = gl.load(table + gl.minimum(begin + 1, end - 1) * BLOCK // PAGE)
            for b in range(begin, end):
                page2 = gl.load(table + gl.minimum(b + 2, end - 1) * BLOCK // PAGE)
                _load_block(b, page0, block, seq_len, table, cache, smem, R, PAGE)
                page0 = page1
                page1 = page2
                block += 1


@gluon.jit
def gather_keys(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Four warps: the same row by row, for pages that no TMA box fits."""
    shared, lengths = work
    row0 = gl.program_id(0) * ROWS
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    t = gl.arange(0, BLOCK, gl.SliceLayout(1, lay))
    c = gl.arange(0, HALF, gl.SliceLayout(0, lay))
    r = gl.arange(0, TILE, gl.SliceLayout(0, lay))
    block = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, _, _, _, _, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, ROWS, RAGGED, 0
        )
        table = cache.table_ptr + request.to(gl.int64) * cache.stride_table
        for b in range(begin, end):
            position = b * BLOCK + t
            real = position < seq_len
            page = gl.load(table + position // PAGE, mask=real, other=0).to(gl.int64)
            row = cache.ptr + (page * cache.stride8_page + (position % PAGE) * cache.stride8_token) * 8
            stage, phase, _ = ring(block)
            for half in gl.static_range(2):
                mbarrier.wait(smem.k_empty.index(2 * stage + half), phase ^ 1)
                cp_async(smem.k.index(2 * stage + half), row[:, None] + (half * HALF + c)[None, :], mask=real[:, None])
                if half == 1 and R > 0:
                    cp_async(smem.k_rope.index(stage), row[:, None] + (LATENT + r)[None, :], mask=real[:, None])
                async_copy.mbarrier_arrive(smem.k_full.index(2 * stage + half), increment_count=False)
            block += 1
