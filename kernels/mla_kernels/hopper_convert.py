"""The role of Hopper decode kernels that reads an fp8 cache: codes into registers, values into shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mla_kernels.hopper import reinterpret, ring
from mla_kernels.hopper_load import HALF, LATENT, TILE
from mla_kernels.schedule import BLOCK, piece

# hopper.SWIZZLED buffers, as words of two values: the same bytes.
SWIZZLED_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))

# Four e4m3 codes of a word to two words of two float16: exact, and NaN stays NaN. There are 64 such conversions a clock
# and SM, but 16 to bfloat16 (FlashMLA's notes on its fp8 kernel); by moving bits that took an H200 5200 clocks a block.
TO_FLOAT16 = gl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")

# Has the 32 bytes at an address brought to L2, and waits for nothing.
PREFETCH = gl.constexpr("""{
prefetch.global.L2 [$1];
mov.b32 $0, 0;
}""")
SECTOR = gl.constexpr(8)  # words of 32 bytes
AHEAD = gl.constexpr(True)  # whether rows are prefetched


@gluon.jit
def _put(buffer, codes):
    """Write words of four e4m3 codes, [rows, words], into a buffer of float16."""
    low, high = gl.inline_asm_elementwise(
        TO_FLOAT16, "=r,=r,r", [codes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip
    words = reinterpret(buffer, gl.int32, [codes.shape[0], 2 * codes.shape[1]], SWIZZLED_WORDS)
    words.store(gl.join(low, high).reshape([codes.shape[0], 2 * codes.shape[1]]))


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
    sector = gl.minimum(gl.arange(0, max(COUNT, 4), gl.SliceLayout(0, lay)), COUNT - 1)
    row = gl.convert_layout(row, gl.SliceLayout(1, lay))  # where it was: rows are four threads' in either
    at = row[:, None] + (first + sector * SECTOR)[None, :]
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _prefetch_halves(row, R: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr):
    _prefetch(row, FIRST * HALF // 4, (LAST - FIRST) * HALF // 4 // SECTOR)
    if R > 0 and LAST == 2:
        _prefetch(row, LATENT // 4, TILE // 4 // SECTOR)


@gluon.jit
def convert_keys(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Four warps: halves FIRST to LAST - 1 of an fp8 cache's rows as float16, without its scale.

    A half is on its way from memory, in registers, while whoever takes it is waited for. It comes from L2: the next
    block's rows are already asked for. Nothing is on its way when writes are fenced, which would wait for that, too.
    """
    shared, lengths = work
    row0 = gl.program_id(0) * ROWS
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    t = gl.arange(0, BLOCK, gl.SliceLayout(1, lay))
    w = gl.arange(0, HALF // 4, gl.SliceLayout(0, lay))
    w_rope = gl.arange(0, TILE // 4, gl.SliceLayout(0, lay))
    block = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, _, _, _, _, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, ROWS, RAGGED, 0
        )
        table = cache.table_ptr + request.to(gl.int64) * cache.stride_table
        page, real = _page_of(begin, end, t, seq_len, table, PAGE)
        next_page, next_real = _page_of(begin + 1, end, t, seq_len, table, PAGE)
        row = _row_of(cache, page, begin, t, PAGE)
        codes = _codes(row, FIRST * HALF // 4, w, real)
        rope = _codes(row, LATENT // 4, w_rope, real & (R > 0) & (FIRST == 1))
        if AHEAD and begin + 1 < end:
            _prefetch_halves(_row_of(cache, next_page, begin + 1, t, PAGE), R, FIRST, LAST)
        for b in range(begin, end):
            stage, phase, _ = ring(block)
            after_page, after_real = _page_of(b + 2, end, t, seq_len, table, PAGE)
            for half in gl.static_range(FIRST, LAST):
                mbarrier.wait(smem.k_empty.index(2 * stage + half), phase ^ 1)
                _put(smem.k.index(2 * stage + half), codes)
                if half == 1 and R > 0:
                    _put(smem.k_rope.index(stage), rope)
                fence_async_shared()
                mbarrier.arrive(smem.k_full.index(2 * stage + half), count=1)
                if half + 1 < LAST:
                    codes = _codes(row, (half + 1) * HALF // 4, w, real)
                    rope = _codes(row, LATENT // 4, w_rope, real & (R > 0))
                else:
                    row = _row_of(cache, next_page, b + 1, t, PAGE)
                    codes = _codes(row, FIRST * HALF // 4, w, next_real)
                    rope = _codes(row, LATENT // 4, w_rope, next_real & (R > 0) & (FIRST == 1))
            real = next_real
            next_page = after_page
            next_real = after_real
            if AHEAD and b + 2 < end:
                _prefetch_halves(_row_of(cache, next_page, b + 2, t, PAGE), R, FIRST, LAST)
            block += 1
