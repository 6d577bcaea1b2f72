"""The roles of Hopper decode for an fp8 cache with one scale: codes in shared memory, float16 in registers.

A matrix instruction of Hopper takes fp8 beside fp8 only, and queries lose too much in it. But its left operand may come
from registers, where e4m3 becomes float16, exactly, four codes in two instructions. So everything is transposed, as in
hopper_few.py: keys, and values transposed, are left operands, queries and weights right ones.

  load_codes, gather_codes   (hopper_codes_load.py) fill k with codes of a step, half a row at a time, when it is empty
  attend                     (hopper_few.py) `scores`: k times query; softmax weights into `weight`
  accumulate                 output += k, transposed, times weight

Buffers are half as large as those of float16, so more blocks are on their way, and codes cross shared memory once to be
written and twice to be read. The order of a product's inner dimension, and of its rows, is free: both are such that the
four codes of a word, which lie side by side in a row of the cache, are one thread's.

Of up to 32 queries. With 64 the roles are those of hopper_turns.py, which takes `scores` and `add_columns` from here;
hopper_tiles.py has those for tile-scaled rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mla_kernels.hopper import SWIZZLED_WORDS, reinterpret, ring
from mla_kernels.hopper_codes_load import BOX
from mla_kernels.hopper_columns import store
from mla_kernels.hopper_load import HALF, LATENT, TILE
from mla_kernels.schedule import BLOCK, piece

# Four codes of a word to four float16; NaN stays NaN. An SM of an H200 takes 56 of the two instructions a clock
# (measured, 16 warps; 37 with four).
TO_FLOAT16 = gl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# The same of two codes each of words of two keys: pairs of float16, of the two keys each.
_TO_PAIRS = """{
.reg .b16 a, b;
.reg .b32 x;
prmt.b32 x, $2, $3, CODES;
mov.b32 {a, b}, x;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
}"""
FIRST_PAIRS, LAST_PAIRS = (gl.constexpr(_TO_PAIRS.replace("CODES", codes)) for codes in ("0x5140", "0x7362"))


@gluon.constexpr_function
def keys_layout(KEYS):
    """Who holds which codes of [KEYS, 128 columns]: as a left operand's [KEYS, 128] but for the order of columns."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]][: 2 if KEYS == 64 else 3],
        block_bases=[],
        shape=[KEYS, 128],
    )


# Who holds which words of [64 keys, 64 words of four columns]: as two transposed left operands of [128, 64].
VALUES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 16], [0, 32]],
        block_bases=[],
        shape=[64, 64],
    )
)


@gluon.constexpr_function
def tile_words(KEYS):
    """Who holds which words of [KEYS, 32 words of four columns]: as two transposed left operands of [64, KEYS]."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0]][: 3 if KEYS == 32 else 4],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 16]],
        block_bases=[],
        shape=[KEYS, 32],
    )


@gluon.jit
def keys_operand(codes, KEYS: gl.constexpr, F: gl.constexpr, WIDTH: gl.constexpr = TILE):
    """Codes [KEYS, WIDTH] as a left operand of float16.

    Of 16 columns a thread's four, 4 t .. 4 t + 3, become what the instruction calls 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t.
    hopper_shrink.py puts queries' columns where they belong then.
    """
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [KEYS // 16, 1], [16, F, 16])
    x = gl.inline_asm_elementwise(TO_FLOAT16, "=r,=r,r", [codes], dtype=gl.float16, is_pure=True, pack=4)
    x = x.reshape([KEYS, WIDTH // 16, 4, 2, 2]).permute((0, 1, 3, 2, 4)).reshape([KEYS, WIDTH])
    return gl.convert_layout(x, gl.DotOperandLayout(0, s_lay, 2))


@gluon.jit
def two_halves_of_box(buffer, KEYS: gl.constexpr):
    """Codes [KEYS, 128] as two of [KEYS, 64]."""
    lay: gl.constexpr = keys_layout(KEYS)
    return gl.split(buffer.load(lay).reshape([KEYS, 2, TILE]).permute((0, 2, 1)))


@gluon.jit
def _add_product(s, codes, q, first: gl.constexpr, KEYS: gl.constexpr, F: gl.constexpr):
    """Start adding keys times queries. Waits for the product before it, whose keys lie in registers."""
    s = warpgroup_mma(keys_operand(codes, KEYS, F), q.permute((1, 0)), s, use_acc=not first, is_async=True)
    return warpgroup_mma_wait(1, deps=[s])


@gluon.jit
def scores(step, q_s, q_rope_s, smem, KEYS: gl.constexpr, F: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr):
    """Keys of the step times queries, [KEYS, F queries], without any scale."""
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [KEYS // 16, 1], [16, F, 16])
    s = gl.zeros([KEYS, F], gl.float32, s_lay)
    stage, phase, zero = ring(step, STAGES)
    for half in gl.static_range(2):
        mbarrier.wait(smem.k_full.index(2 * stage + half), phase)
        k, q = smem.k.index(2 * stage + half), q_s.index(zero + half)
        tile0, tile1 = two_halves_of_box(k.slice(0, BOX, dim=1), KEYS)
        s = _add_product(s, tile0, q.slice(0, TILE, dim=1), half == 0, KEYS, F)
        s = _add_product(s, tile1, q.slice(TILE, TILE, dim=1), False, KEYS, F)
        tile2, tile3 = two_halves_of_box(k.slice(BOX, BOX, dim=1), KEYS)
        s = _add_product(s, tile2, q.slice(2 * TILE, TILE, dim=1), False, KEYS, F)
        s = _add_product(s, tile3, q.slice(3 * TILE, TILE, dim=1), False, KEYS, F)
        if half == 1 and R > 0:
            rope, _ = two_halves_of_box(smem.k_rope.index(stage), KEYS)
            s = _add_product(s, rope, q_rope_s, False, KEYS, F)
        mbarrier.arrive(smem.k_empty.index(2 * stage + half), count=1)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def add_columns(
    acc, words, weight, PAIRS: gl.constexpr, WARPS: gl.constexpr, F: gl.constexpr, KEYS: gl.constexpr = BLOCK
):  # fmt: skip
    """Start adding two columns of each word times weights.   words: of [KEYS, 8 words for each warp].

    The columns become a left operand of float16, [16 for each warp, KEYS].
    """
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, F, 16])
    y0, y1 = gl.inline_asm_elementwise(
        PAIRS, "=r,=r,r,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )  # fmt: skip
    x = gl.join(y0, y1).reshape([KEYS, WARPS, 8, 2]).permute((1, 3, 2, 0)).reshape([16 * WARPS, KEYS])
    return warpgroup_mma(gl.convert_layout(x, gl.DotOperandLayout(0, o_lay, 2)), weight, acc, is_async=True)


@gluon.jit
def _in_order(acc0, acc1, F: gl.constexpr):
    """Accumulators of a word's first two columns and its last two as [256, F], in the order of the latent."""
    x = gl.join(acc0, acc1).reshape([8, 2, 8, F, 2]).permute((0, 2, 4, 1, 3))
    return x.reshape([HALF, F])


@gluon.jit
def _words(b, u: gl.constexpr, buffer, known, KEYS: gl.constexpr):
    """Of a half of block `b`, the u-th of the step: [64 keys, 64 words of four columns]; 0 from token `known` on."""
    words = reinterpret(buffer, gl.int32, [KEYS, HALF // 4], SWIZZLED_WORDS).slice(u * BLOCK, BLOCK, dim=0).load(VALUES)
    if (b + 1) * BLOCK > known:  # what is there may be NaN, and 0 * NaN is NaN
        position = b * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, VALUES))
        words = gl.where((position < known)[:, None], words, 0)
    return words


@gluon.jit
def words_of_tile(
    b, at: gl.constexpr, tile: gl.constexpr, buffer, known, KEYS: gl.constexpr, STEP_KEYS: gl.constexpr
):  # fmt: skip
    """The same of 128 columns alone, those of the half's first or second tile, and of KEYS keys from the at-th of block
    `b` on: [KEYS, 32 words], for four warps."""
    lay: gl.constexpr = tile_words(KEYS)
    words = reinterpret(buffer, gl.int32, [STEP_KEYS, HALF // 4], SWIZZLED_WORDS)
    words = words.slice(tile * 32, 32, dim=1).slice(at, KEYS, dim=0).load(lay)
    # Of (b + 1) * BLOCK, which take_turns has at hand: from b * BLOCK on, 88 bytes more were spilled there.
    if (b + 1) * BLOCK + (at + KEYS - BLOCK) > known:
        position = b * BLOCK + at + gl.arange(0, KEYS, gl.SliceLayout(1, lay))
        words = gl.where((position < known)[:, None], words, 0)
    return words


@gluon.jit
def _accumulate_step(
    b, acc, step, known, smem, F: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Add values times a step's weights. Codes become float16 while weights, or products, are waited for."""
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, F, 16])
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    BEFORE: gl.constexpr = 0 if F > 16 else 1  # products still on their way, whose left operands are in registers
    acc0, acc1, acc2, acc3 = acc
    stage, phase, _ = ring(step, STAGES)
    first, second = smem.k.index(2 * stage), smem.k.index(2 * stage + 1)
    mbarrier.wait(smem.k_full.index(2 * stage), phase)
    words = _words(b, 0, first, known, STEP * BLOCK)
    mbarrier.wait(smem.weight_full, step & 1)
    if gl.max(smem.grew.load(flag_lay), 0) > 0:
        rescale = smem.factor.load(gl.SliceLayout(0, o_lay))[None, :]
        acc0 = acc0 * rescale
        acc1 = acc1 * rescale
        acc2 = acc2 * rescale
        acc3 = acc3 * rescale
    for u in gl.static_range(STEP):
        if u > 0:
            words = _words(b + u, u, first, known, STEP * BLOCK)
        weight = smem.weight.slice(u * BLOCK, BLOCK, dim=0)
        acc0 = add_columns(acc0, words, weight, FIRST_PAIRS, 8, F)
        acc0, acc3 = warpgroup_mma_wait(BEFORE, deps=[acc0, acc3])
        acc1 = add_columns(acc1, words, weight, LAST_PAIRS, 8, F)
        if u == STEP - 1:
            mbarrier.arrive(smem.k_empty.index(2 * stage), count=1)
        if u == 0:
            mbarrier.wait(smem.k_full.index(2 * stage + 1), phase)
        words = _words(b + u, u, second, known, STEP * BLOCK)
        acc0, acc1 = warpgroup_mma_wait(BEFORE, deps=[acc0, acc1])
        acc2 = add_columns(acc2, words, weight, FIRST_PAIRS, 8, F)
        acc1, acc2 = warpgroup_mma_wait(BEFORE, deps=[acc1, acc2])
        acc3 = add_columns(acc3, words, weight, LAST_PAIRS, 8, F)
        acc2, acc3 = warpgroup_mma_wait(BEFORE, deps=[acc2, acc3])
    mbarrier.arrive(smem.k_empty.index(2 * stage + 1), count=1)
    acc0, acc1, acc2, acc3 = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, acc3])
    mbarrier.arrive(smem.weight_empty, count=1)
    return acc0, acc1, acc2, acc3


@gluon.jit
def _write_half(
    acc0, acc1, half, slot, out, row0, rows, token, N: gl.constexpr, F: gl.constexpr
):  # fmt: skip
    out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot = out
    in_16_bytes: gl.constexpr = 4 if F == 16 else 8
    acc = _in_order(acc0, acc1, F)
    if slot < 0:
        store(acc, out_ptr + half * HALF, row0, rows, token, stride_out_t, stride_out_n, N, F, 8)
    else:
        store(acc, part_ptr + half * HALF, row0, rows, slot * rows_per_slot, LATENT, 0, 1, F, in_16_bytes)


@gluon.jit
def accumulate(
    out, work, smem, N: gl.constexpr, F: gl.constexpr, RAGGED: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Two warpgroups: values times weights."""
    shared, lengths = work
    row0 = gl.program_id(0) * F
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, F, 16])
    step = 0
    pieces = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, _, rows, slot, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0
        )
        if rows > 0:
            known = gl.minimum(seq_len, end * BLOCK)
            nothing = gl.zeros([HALF // 2, F], gl.float32, o_lay)
            acc0, acc1, acc2, acc3 = nothing, nothing, nothing, nothing
            for b in range(begin, end, STEP):
                acc0, acc1, acc2, acc3 = _accumulate_step(
                    b, (acc0, acc1, acc2, acc3), step, known, smem, F, STEP, STAGES
                )
                step += 1
            mbarrier.wait(smem.last_full, pieces & 1)
            last = smem.last.load(gl.SliceLayout(0, o_lay))[None, :]
            mbarrier.arrive(smem.last_empty, count=1)
            pieces += 1
            _write_half(acc0 * last, acc1 * last, 0, slot, out, row0, rows, token, N, F)
            _write_half(acc2 * last, acc3 * last, 1, slot, out, row0, rows, token, N, F)
