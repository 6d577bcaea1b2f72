"""The role of Hopper decode that unpacks tile-scaled rows: codes into registers, values into shared memory.

Of more than 32 query rows. With fewer, rows are copied as they are (hopper_tiles.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from mla_kernels.hopper import SWIZZLED_WORDS, cp_async, reinterpret, ring
from mla_kernels.hopper_load import LATENT, TILE
from mla_kernels.schedule import BLOCK, piece

# Four e4m3 codes of a word, each times a float32, to two words of two float16 or bfloat16, rounded once: a product is
# exact in bfloat16 if the factor is a power of two.
_SCALED = """{
.reg .b16 low, high, a, b, c, d;
.reg .b32 x, y;
.reg .f32 e, f, g, h;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 x, low;
cvt.rn.f16x2.e4m3x2 y, high;
mov.b32 {a, b}, x;
mov.b32 {c, d}, y;
cvt.f32.f16 e, a;
cvt.f32.f16 f, b;
cvt.f32.f16 g, c;
cvt.f32.f16 h, d;
mul.f32 e, e, $3;
mul.f32 f, f, $3;
mul.f32 g, g, $3;
mul.f32 h, h, $3;
cvt.rn.DTYPE.f32 $0, f, e;
cvt.rn.DTYPE.f32 $1, h, g;
}"""
SCALED_FLOAT16 = gl.constexpr(_SCALED.replace("DTYPE", "f16x2"))
SCALED_BFLOAT16 = gl.constexpr(_SCALED.replace("DTYPE", "bf16x2"))
# Two bfloat16 to two float16.
FROM_BFLOAT16 = gl.constexpr("""{
.reg .b32 x, y;
.reg .f32 e, f;
shl.b32 x, $1, 16;
and.b32 y, $1, 0xffff0000;
mov.b32 e, x;
mov.b32 f, y;
cvt.rn.f16x2.f32 $0, f, e;
}""")

# Has the 32 bytes at an address brought to L2, and waits for nothing.
PREFETCH = gl.constexpr("""{
prefetch.global.L2 [$1];
mov.b32 $0, 0;
}""")
SECTOR = gl.constexpr(8)  # words of 32 bytes
# Of a packed row, in words: a tile that has a scale of its own, and where rotary values begin.
TILE_WORDS, ROPE_AT = gl.constexpr(32), gl.constexpr(132)
AHEAD = gl.constexpr(True)  # whether rows are prefetched: 128 x 4096 x 64 heads took an H200 203 us without, 170 with


@gluon.jit
def _put_scaled(buffer, tile: gl.constexpr, codes, scale):
    """Write a tile of 128 columns so, each row times its scale, into a buffer of float16 or bfloat16."""
    text: gl.constexpr = SCALED_FLOAT16 if buffer.dtype == gl.float16 else SCALED_BFLOAT16
    low, high = gl.inline_asm_elementwise(
        text, "=r,=r,r,f", [codes, scale[:, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip
    words = reinterpret(buffer, gl.int32, [codes.shape[0], 4 * codes.shape[1]], SWIZZLED_WORDS)
    part = words.slice(tile * 2 * codes.shape[1], 2 * codes.shape[1], dim=1)
    part.store(gl.join(low, high).reshape([codes.shape[0], 2 * codes.shape[1]]))


@gluon.jit
def _page_of(b, end, t, seq_len, table, PAGE: gl.constexpr):
    """(Pages, whether they are real) of block `b`'s rows."""
    position = b * BLOCK + t
    real = (position < seq_len) & (b < end)
    return gl.load(table + position // PAGE, mask=real, other=0), real


@gluon.jit
def _row_of(cache, page, b, t, PAGE: gl.constexpr):
    """Addresses of block `b`'s rows, in words."""
    at = page.to(gl.int64) * cache.stride8_page + ((b * BLOCK + t) % PAGE) * cache.stride8_token
    return cache.ptr + at * 4


@gluon.jit
def _codes(row, first, words, real):
    """Words `first` to `first + len(words) - 1` of cache rows; zeros where a row is not real."""
    return gl.load(row[:, None] + (first + words)[None, :], mask=real[:, None], other=0)


@gluon.jit
def _prefetch(row, first, COUNT: gl.constexpr):
    """Bring COUNT sectors of cache rows to L2, from word `first` on."""
    lay: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    WIDTH: gl.constexpr = 4 if COUNT <= 4 else 8 if COUNT <= 8 else COUNT
    sector = gl.minimum(gl.arange(0, WIDTH, gl.SliceLayout(0, lay)), COUNT - 1)
    row = gl.convert_layout(row, gl.SliceLayout(1, lay))  # where it was: rows are four threads' in either
    at = row[:, None] + (first + sector * SECTOR)[None, :]
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _prefetch_row(row, R: gl.constexpr):
    _prefetch(row, 0, LATENT // 4 // SECTOR)
    _prefetch(row, LATENT // 4, 5 if R > 0 else 1)  # scales, rope


@gluon.jit
def _scale(row, tile: gl.constexpr, real):
    """Of a tile of packed rows."""
    bits = gl.load(row + (LATENT // 4 + tile), mask=real, other=0)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _packed_half(row, half: gl.constexpr, words, real):
    """Codes of a half's two tiles, and their scales."""
    codes0 = _codes(row, 2 * half * TILE_WORDS, words, real)
    codes1 = _codes(row, (2 * half + 1) * TILE_WORDS, words, real)
    return codes0, codes1, _scale(row, 2 * half, real), _scale(row, 2 * half + 1, real)


@gluon.jit
def _put_rope(buffer, row, words, real):
    """Copy packed rows' rotary values, which are bfloat16, into a buffer of that or of float16."""
    target = reinterpret(buffer, gl.int32, [BLOCK, TILE // 2], SWIZZLED_WORDS)
    cp_async(target, row[:, None] + (ROPE_AT + words)[None, :], mask=real[:, None])
    async_copy.commit_group()


@gluon.jit
def _finish_rope(buffer, LAYOUT: gl.constexpr):
    async_copy.wait_group(0)
    if buffer.dtype == gl.float16:
        words = reinterpret(buffer, gl.int32, [BLOCK, TILE // 2], SWIZZLED_WORDS)
        pairs = gl.inline_asm_elementwise(
            FROM_BFLOAT16, "=r,r", [words.load(LAYOUT)], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
        words.store(pairs)


@gluon.jit
def unpack_keys(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Four warps: packed rows (cache_layout.PackedRow), half by half, scaled, in the queries' dtype.

    A half is on its way from memory, in registers, while whoever takes it is waited for. It comes from L2: the next
    block's rows are already asked for. Whoever takes it has to fence, since a fence waits for all that a thread has on
    its way, which would be rows and prefetches here.
    """
    shared, lengths = work
    row0 = gl.program_id(0) * ROWS
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    t = gl.arange(0, BLOCK, gl.SliceLayout(1, lay))
    w = gl.arange(0, TILE_WORDS, gl.SliceLayout(0, lay))
    block = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, _, _, _, _, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, ROWS, RAGGED, 0
        )
        table = cache.table_ptr + request.to(gl.int64) * cache.stride_table
        page, real = _page_of(begin, end, t, seq_len, table, PAGE)
        next_page, next_real = _page_of(begin + 1, end, t, seq_len, table, PAGE)
        row = _row_of(cache, page, begin, t, PAGE)
        codes0, codes1, scale0, scale1 = _packed_half(row, 0, w, real)
        if AHEAD and begin + 1 < end:
            _prefetch_row(_row_of(cache, next_page, begin + 1, t, PAGE), R)
        for b in range(begin, end):
            stage, phase, _ = ring(block)
            after_page, after_real = _page_of(b + 2, end, t, seq_len, table, PAGE)
            for half in gl.static_range(2):
                mbarrier.wait(smem.k_empty.index(2 * stage + half), phase ^ 1)
                if half == 1 and R > 0:
                    _put_rope(smem.k_rope.index(stage), row, w, real)
                _put_scaled(smem.k.index(2 * stage + half), 0, codes0, scale0)
                _put_scaled(smem.k.index(2 * stage + half), 1, codes1, scale1)
                if half == 1 and R > 0:
                    _finish_rope(smem.k_rope.index(stage), lay)
                mbarrier.arrive(smem.k_full.index(2 * stage + half), count=1)
                if half == 0:
                    codes0, codes1, scale0, scale1 = _packed_half(row, 1, w, real)
                else:
                    row = _row_of(cache, next_page, b + 1, t, PAGE)
                    real = next_real
                    codes0, codes1, scale0, scale1 = _packed_half(row, 0, w, real)
            next_page = after_page
            next_real = after_real
            if AHEAD and b + 2 < end:
                _prefetch_row(_row_of(cache, next_page, b + 2, t, PAGE), R)
            block += 1
