"""Queries of Hopper's decode kernels as float16, where an fp8 cache is: in their buffers, in range."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_kernels.hopper import SWIZZLED_WORDS, reinterpret
from mla_kernels.hopper_load import HALF, LATENT, TILE

# Two values of a word: the larger sizes of either, float32 of both, both times a float32 as float16.
_MAX = "{.reg .b32 x; and.b32 x, $2, 0x7fff7fff; max.DTYPE $0, $1, x;}"
MAX_BFLOAT16, MAX_FLOAT16 = gl.constexpr(_MAX.replace("DTYPE", "bf16x2")), gl.constexpr(_MAX.replace("DTYPE", "f16x2"))
_BFLOAT16 = "{.reg .b32 x, y; shl.b32 x, WORD, 16; and.b32 y, WORD, 0xffff0000; mov.b32 LOW, x; mov.b32 HIGH, y;}"
_FLOAT16 = "{.reg .b16 x, y; mov.b32 {x, y}, WORD; cvt.f32.f16 LOW, x; cvt.f32.f16 HIGH, y;}"
_SHRINK = "{.reg .f32 l, h; SPLIT mul.f32 l, l, $2; mul.f32 h, h, $2; cvt.rn.f16x2.f32 $0, h, l;}"


def _split(text: str, word: str, low: str, high: str) -> str:
    return text.replace("WORD", word).replace("LOW", low).replace("HIGH", high)


SPLIT_BFLOAT16 = gl.constexpr(_split(_BFLOAT16, "$2", "$0", "$1"))
SPLIT_FLOAT16 = gl.constexpr(_split(_FLOAT16, "$2", "$0", "$1"))
SHRINK_BFLOAT16 = gl.constexpr(_SHRINK.replace("SPLIT", _split(_BFLOAT16, "$1", "l", "h")))
SHRINK_FLOAT16 = gl.constexpr(_SHRINK.replace("SPLIT", _split(_FLOAT16, "$1", "l", "h")))


@gluon.jit
def _words_of(q_s, c, F: gl.constexpr):
    """64 columns of query rows, the c-th, as words of two values."""
    words = reinterpret(q_s, gl.int32, [2, F, HALF // 2], SWIZZLED_WORDS)
    return words.index(c * TILE // HALF).slice(c * TILE % HALF // 2, TILE // 2, dim=1)


@gluon.jit
def _larger(largest, words, MAX: gl.constexpr):
    return gl.inline_asm_elementwise(MAX, "=r,r,r", [largest, words], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _shrunk(words, shrink, SHRINK: gl.constexpr):
    return gl.inline_asm_elementwise(SHRINK, "=r,r,f", [words, shrink], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _in_order_of_keys(words, F: gl.constexpr):
    """Words of 64 columns in the order that hopper_codes.py gives those of keys: of eight, 2 t + h becomes 4 h + t."""
    return words.reshape([F, TILE // 16, 4, 2]).permute((0, 1, 3, 2)).reshape([F, TILE // 2])


@gluon.jit
def shrink_q(q_s, q_rope_s, dtype: gl.constexpr, F: gl.constexpr, R: gl.constexpr, WARPS: gl.constexpr):
    """Make float16 of query rows of `dtype` that are in their buffers, divided by a power of two that brings the
    largest value to 256 or more and below 512, and their columns in the order of keys'. Returns that power.

    float16 ends at 65504, and what is below 2^-14 loses bits: of rows so much smaller than the largest, by 2^-33 of
    that one's values.
    """
    MAX: gl.constexpr = MAX_FLOAT16 if dtype == gl.float16 else MAX_BFLOAT16
    SPLIT: gl.constexpr = SPLIT_FLOAT16 if dtype == gl.float16 else SPLIT_BFLOAT16
    SHRINK: gl.constexpr = SHRINK_FLOAT16 if dtype == gl.float16 else SHRINK_BFLOAT16
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    rope = reinterpret(q_rope_s, gl.int32, [F, TILE // 2], SWIZZLED_WORDS)
    largest = gl.zeros([F, TILE // 2], gl.int32, lay)
    for c in gl.static_range(LATENT // TILE):
        largest = _larger(largest, _words_of(q_s, c, F).load(lay), MAX)
    if R > 0:
        largest = _larger(largest, rope.load(lay), MAX)
    low, high = gl.inline_asm_elementwise(
        SPLIT, "=f,=f,r", [largest], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )  # fmt: skip
    size = gl.maximum(low, high)
    of_all = gl.max(gl.max(gl.where(size < float("inf"), size, 0.0), 1), 0)  # what is infinite spoils its own row alone
    power = gl.maximum(gl.where(of_all > 0, gl.floor(gl.log2(of_all)) - 8, 0.0), -126.0)  # its inverse is finite
    shrink = gl.exp2(-power)
    for c in gl.static_range(LATENT // TILE):
        words = _words_of(q_s, c, F)
        words.store(_in_order_of_keys(_shrunk(words.load(lay), shrink, SHRINK), F))
    if R > 0:
        rope.store(_in_order_of_keys(_shrunk(rope.load(lay), shrink, SHRINK), F))
    return gl.exp2(power)
