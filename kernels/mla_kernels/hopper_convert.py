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


@gluon.jit
def _put(buffer, codes):
    """Write words of four e4m3 codes, [rows, words], into a buffer of float16, for matrix instructions to read."""
    low, high = gl.inline_asm_elementwise(
        TO_FLOAT16, "=r,=r,r", [codes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip
    words = reinterpret(buffer, gl.int32, [codes.shape[0], 2 * codes.shape[1]], SWIZZLED_WORDS)
    words.store(gl.join(low, high).reshape([codes.shape[0], 2 * codes.shape[1]]))
    fence_async_shared()


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
def convert_keys(
    cache, work, smem, N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Four warps: rows of an fp8 cache as float16, without its scale.

    A block of codes is on its way from memory, in registers, while the one before it is converted: its pages were read
    before that.
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
        row = _row_of(cache, page, begin, t, PAGE)
        left = _codes(row, 0, w, real)
        right = _codes(row, HALF // 4, w, real)
        rope = _codes(row, LATENT // 4, w_rope, real & (R > 0))
        page, real = _page_of(begin + 1, end, t, seq_len, table, PAGE)
        for b in range(begin, end):
            stage, phase, _ = ring(block)
            row = _row_of(cache, page, b + 1, t, PAGE)
            there = real
            page, real = _page_of(b + 2, end, t, seq_len, table, PAGE)
            mbarrier.wait(smem.k_empty.index(2 * stage), phase ^ 1)
            _put(smem.k.index(2 * stage), left)
            mbarrier.arrive(smem.k_full.index(2 * stage), count=1)
            left = _codes(row, 0, w, there)
            mbarrier.wait(smem.k_empty.index(2 * stage + 1), phase ^ 1)
            _put(smem.k.index(2 * stage + 1), right)
            if R > 0:
                _put(smem.k_rope.index(stage), rope)
                rope = _codes(row, LATENT // 4, w_rope, there)
            mbarrier.arrive(smem.k_full.index(2 * stage + 1), count=1)
            right = _codes(row, HALF // 4, w, there)
            block += 1
