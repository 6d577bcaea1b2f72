"""The roles of Hopper decode for tile-scaled rows: codes in shared memory, float16 in registers, scales beside both.

As in hopper_codes.py codes become float16 as left operands, of up to 32 queries, but a scale for each key and tile of
128 columns cannot wait until the end:

  load_codes, gather_codes   (hopper_codes_load.py) fill k with codes and scales of a step, half a row at a time, and
                             k_rope with rotary values, when they are empty
  attend                     for each tile a product of its own, codes times query; scores are their sum, each times the
                             key's scale of the tile, and rotary values times query; softmax weights, times scales, into
                             `weight`, tile by tile
  accumulate, twice          half of the output += its half of k, transposed, times weights of its two tiles

Whoever adds values up waits for weights, and `attend` has then read all that it wants of the step. It says by itself
that rotary values are read, where these have fewer buffers.

Rotary values of the cache are bfloat16, and so are the queries' then: those of float16 queries are a sum of two.

Weights are float16, which ends at 2^16 and is coarse below 2^-14, and scales may be anything. A piece's scales are
divided by a power of two, the same for all tiles, that the largest one so far asks for: those of 2^-20 of it still keep
all bits of a weight of 1. Where it grows, outputs are rescaled, as where the softmax's reference does.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_kernels.hopper import NARROW_FLOATS, SWIZZLED, SWIZZLED_WORDS, barrier, reinterpret, ring, uniform
from mla_kernels.hopper_codes import (
    FIRST_PAIRS,
    LAST_PAIRS,
    add_columns,
    keys_operand,
    two_halves_of_box,
    words_of_tile,
)
from mla_kernels.hopper_codes_load import BOX
from mla_kernels.hopper_columns import rescale_sums, store_tile, thread_sums
from mla_kernels.hopper_decode import LAZY, NOTHING, finish_piece, write_plan
from mla_kernels.hopper_load import HALF, TILE, load_q
from mla_kernels.hopper_shrink import shrink_q
from mla_kernels.schedule import BLOCK, piece

# Binary orders up to which scales are brought: a weight is up to 2^LAZY, and the product has to be below 2^16.
ORDERS = gl.constexpr(7.0)
# Scale that stands for an infinite value as our writer has it. All others of its piece would be 0 beside it, without
# a word: answers are no numbers then.
INFINITE = gl.constexpr(2.0**120)
# Two float16 of a word as bfloat16, rounded, and what is missing then, which bfloat16 holds.
_SPLIT_FLOAT16 = gl.constexpr("""{
.reg .b16 x, y;
.reg .b32 a, b;
.reg .f32 l, h, c, d;
mov.b32 {x, y}, $2;
cvt.f32.f16 l, x;
cvt.f32.f16 h, y;
cvt.rn.bf16x2.f32 a, h, l;
mov.b32 $0, a;
shl.b32 b, a, 16;
and.b32 a, a, 0xffff0000;
mov.b32 c, b;
mov.b32 d, a;
sub.f32 l, l, c;
sub.f32 h, h, d;
cvt.rn.bf16x2.f32 $1, h, l;
}""")


@gluon.constexpr_function
def _scales_layout(KEYS):
    """Who holds which scales of [KEYS, 4]: all of a key whoever has its scores."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]][: 2 if KEYS == 64 else 3],
        block_bases=[],
        shape=[KEYS, 4],
    )


@gluon.jit
def _scales(smem, stage, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scales of a step's keys, tile by tile: four times [KEYS]. Read again where they are used, to save registers."""
    lay: gl.constexpr = _scales_layout(KEYS)
    x = reinterpret(smem.k_scale.index(stage), gl.float32, [KEYS, 4], NARROW_FLOATS).load(lay).reshape([KEYS, 2, 2])
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return (
        gl.convert_layout(x0, LAYOUT),
        gl.convert_layout(x1, LAYOUT),
        gl.convert_layout(x2, LAYOUT),
        gl.convert_layout(x3, LAYOUT),
    )


@gluon.jit
def _two_quarters(half, KEYS: gl.constexpr):
    """Codes [KEYS, 64] as two of [KEYS, 32]."""
    return gl.split(half.reshape([KEYS, 2, TILE // 2]).permute((0, 2, 1)))


@gluon.jit
def _start(keys, q, part: gl.constexpr, p):
    """Start adding keys, the part-th that are so wide of a tile, times queries; the first begins anew."""
    WIDTH: gl.constexpr = keys.shape[1]
    return warpgroup_mma(
        keys, q.slice(part * WIDTH, WIDTH, dim=1).permute((1, 0)), p, use_acc=part > 0, is_async=True
    )  # fmt: skip


@gluon.jit
def _scores(
    step, power, q_s, q_rope_s, smem,
    KEYS: gl.constexpr, F: gl.constexpr, R: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
    ROPES: gl.constexpr,
):  # fmt: skip
    """Keys of the step times queries, [KEYS, F queries].

    power: what the queries' latent was divided by.   HALVES: whether their rotary values are a sum of two.
    At most two products are on their way, whose left operands lie in registers. With 32 queries these are of half as
    many columns, and a tile's is over when the next one begins: there are no registers for what two tiles give.
    """
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [KEYS // 16, 1], [16, F, 16])
    key_lay: gl.constexpr = gl.SliceLayout(1, s_lay)
    WIDTH: gl.constexpr = TILE if F == 16 else TILE // 2
    nothing = gl.zeros([KEYS, F], gl.float32, s_lay)
    stage, phase, zero = ring(step, STAGES)
    mbarrier.wait(smem.k_full.index(2 * stage), phase)
    s = nothing
    p = nothing
    for t in gl.static_range(4):
        if t == 2:
            mbarrier.wait(smem.k_full.index(2 * stage + 1), phase)
        half0, half1 = two_halves_of_box(smem.k.index(2 * stage + t // 2).slice(t % 2 * BOX, BOX, dim=1), KEYS)
        q = q_s.index(zero + t // 2).slice(t % 2 * BOX, BOX, dim=1)
        if F == 16:
            before = p
            p = _start(keys_operand(half0, KEYS, F), q, 0, nothing)
            if t > 0:
                before, p = warpgroup_mma_wait(1, deps=[before, p])
                s = gl.fma(before, _scales(smem, stage, KEYS, key_lay)[t - 1][:, None], s)
            p = _start(keys_operand(half1, KEYS, F), q, 1, p)
            p = warpgroup_mma_wait(1, deps=[p])
        else:
            part0, part1 = _two_quarters(half0, KEYS)
            part2, part3 = _two_quarters(half1, KEYS)
            keys = keys_operand(part0, KEYS, F, WIDTH)
            if t > 0:
                p = warpgroup_mma_wait(0, deps=[p])
                s = gl.fma(p, _scales(smem, stage, KEYS, key_lay)[t - 1][:, None], s)
            p = _start(keys, q, 0, nothing)
            p = _start(keys_operand(part1, KEYS, F, WIDTH), q, 1, p)
            p = warpgroup_mma_wait(1, deps=[p])
            p = _start(keys_operand(part2, KEYS, F, WIDTH), q, 2, p)
            p = warpgroup_mma_wait(1, deps=[p])
            p = _start(keys_operand(part3, KEYS, F, WIDTH), q, 3, p)
            p = warpgroup_mma_wait(1, deps=[p])
    last = _scales(smem, stage, KEYS, key_lay)[3][:, None]
    if R > 0:
        place, turn = stage, phase
        if ROPES < STAGES:
            place, turn, _ = ring(step, ROPES)
        mbarrier.wait(smem.rope_full.index(place), turn)
        rope = reinterpret(smem.k_rope.index(place), gl.bfloat16, [KEYS, TILE], SWIZZLED)
        rope = rope.load(gl.DotOperandLayout(0, s_lay, 2))
        if ROPES < STAGES:
            mbarrier.arrive(smem.rope_empty.index(place), count=1)
        r = warpgroup_mma(rope, q_rope_s.index(zero).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if HALVES:
            r = warpgroup_mma(rope, q_rope_s.index(zero + 1).permute((1, 0)), r, is_async=True)
        p, r = warpgroup_mma_wait(0, deps=[p, r])
        s = gl.fma(gl.fma(p, last, s), power, r)
    else:
        p = warpgroup_mma_wait(0, deps=[p])
        s = gl.fma(p, last, s) * power
    return s


@gluon.jit
def _size(x):
    return gl.maximum(x, -x)


@gluon.jit
def _attend_step(
    b, begin, top, shrink, total, step, seen, row0, scale_log2, power, q_s, q_rope_s, smem,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, HALVES: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, ROPES: gl.constexpr,
):  # fmt: skip
    """Scores and softmax weights of the step from block `b` on, as hopper_few.py's for any other cache. Returns the
    queries' references, the power of two that scales are multiplied with, and sums of weights that no thread has added
    to another's yet.

    seen: (position of the request's first query token, end of the piece in tokens, tokens that all queries see).
    """
    KEYS: gl.constexpr = STEP * BLOCK
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [KEYS // 16, 1], [16, F, 16])
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [KEYS // 16], [0])
    s = _scores(step, power, q_s, q_rope_s, smem, KEYS, F, R, HALVES, STAGES, ROPES)
    stage, _, _ = ring(step, STAGES)
    scale0, scale1, scale2, scale3 = _scales(smem, stage, KEYS, gl.SliceLayout(1, s_lay))
    first_query, known, all_see = seen
    if b * BLOCK + KEYS > all_see:
        position = b * BLOCK + gl.arange(0, KEYS, gl.SliceLayout(1, s_lay))
        # Computed here, from a zero that the compiler cannot see: the loop has no registers for it.
        row = row0 + (uniform(step) >> 30) + gl.arange(0, F, gl.SliceLayout(0, s_lay))
        sees = gl.minimum(first_query + row // N, known - 1)  # position of the last key that the query may see
        s = gl.where(position[:, None] <= sees[None, :], s, float("-inf"))
        scale0 = gl.where(position < known, scale0, 0.0)  # what is there may be NaN, and 0 * NaN is NaN
        scale1 = gl.where(position < known, scale1, 0.0)
        scale2 = gl.where(position < known, scale2, 0.0)
        scale3 = gl.where(position < known, scale3, 0.0)
    above = gl.fma(s, scale_log2, -top[None, :])
    weight = gl.exp2(above)
    scale = gl.maximum(gl.maximum(_size(scale0), _size(scale1)), gl.maximum(_size(scale2), _size(scale3)))
    grew = 1
    if b > begin:
        far = (above > LAZY) | (scale * shrink > 2.0**ORDERS)[:, None]
        grew = gl.max(far.to(gl.int32).reshape([KEYS * F]), 0)
    factor = gl.full([F], 1.0, gl.float32, gl.SliceLayout(0, s_lay))
    if grew > 0:
        largest = gl.max(s, 0)
        new_top = gl.where(gl.fma(largest, scale_log2, -top) > LAZY, largest * scale_log2, top)
        rescale = gl.exp2(top - new_top)
        weight = gl.exp2(gl.fma(s, scale_log2, -new_top[None, :]))
        most = gl.max(scale, 0)
        new_shrink = gl.minimum(shrink, gl.exp2(ORDERS - 1 - gl.floor(gl.log2(most))))
        new_shrink = gl.where(most < INFINITE, new_shrink, float("nan"))
        factor = rescale * (new_shrink / shrink)
        total = rescale_sums(total, rescale)
        top = new_top
        shrink = new_shrink
    total += thread_sums(weight, KEYS, F)
    # Who adds values up may be waiting already: all is computed when the buffers are free.
    weight0 = (weight * (scale0 * shrink)[:, None]).to(gl.float16)
    weight1 = (weight * (scale1 * shrink)[:, None]).to(gl.float16)
    weight2 = (weight * (scale2 * shrink)[:, None]).to(gl.float16)
    weight3 = (weight * (scale3 * shrink)[:, None]).to(gl.float16)
    mbarrier.wait(smem.weight_empty, (step & 1) ^ 1)
    smem.factor.store(factor)
    smem.weight[0].store(weight0)
    smem.weight[1].store(weight1)
    smem.weight[2].store(weight2)
    smem.weight[3].store(weight3)
    smem.grew.store(gl.full([1], 0, gl.int32, flag_lay) + grew)
    fence_async_shared()
    mbarrier.arrive(smem.weight_full, count=1)
    return top, shrink, total


@gluon.jit
def _split_rope(q_rope_s, F: gl.constexpr, WARPS: gl.constexpr):
    """Make a sum of two bfloat16 of float16 in the first of two buffers."""
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    words = reinterpret(q_rope_s, gl.int32, [2, F, TILE // 2], SWIZZLED_WORDS)
    rounded, rest = gl.inline_asm_elementwise(
        _SPLIT_FLOAT16, "=r,=r,r", [words.index(0).load(lay)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip
    words.index(0).store(rounded)
    words.index(1).store(rest)


@gluon.jit
def attend(
    q, q_rope_s, lse, plan, scale_log2, work, smem,
    N: gl.constexpr, F: gl.constexpr, R: gl.constexpr, RAGGED: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, ROPES: gl.constexpr,
):  # fmt: skip
    """A warpgroup for each block of a step: scores, online softmax, weights for the others, and the LSE."""
    q_s = q[4]
    shared, lengths = work
    write_plan(plan, shared)
    row0 = gl.program_id(0) * F
    WARPS: gl.constexpr = 4 * STEP
    dtype: gl.constexpr = q[0].dtype.element_ty
    HALVES: gl.constexpr = dtype == gl.float16
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, F, 16])
    query_lay: gl.constexpr = gl.SliceLayout(0, s_lay)
    step = 0
    pieces = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, tokens, rows, slot, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0
        )
        if rows > 0:
            load_q(q, token, row0, rows, N, F, R, gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
            power = shrink_q(q_s, q[5], dtype, F, 0, WARPS)
            if HALVES and R > 0:
                _split_rope(q_rope_s, F, WARPS)
            fence_async_shared()
            barrier()
            known = gl.minimum(seq_len, end * BLOCK)  # what is behind a piece is another part's
            seen = (seq_len - tokens, known, gl.minimum(seq_len - tokens + 1, known))
            top = gl.full([F], NOTHING, gl.float32, query_lay)
            shrink = 2.0**100  # more than any scale asks for
            total = thread_sums(gl.zeros([STEP * BLOCK, F], gl.float32, s_lay), STEP * BLOCK, F)
            for b in range(begin, end, STEP):
                top, shrink, total = _attend_step(
                    b, begin, top, shrink, total, step, seen, row0, scale_log2, power, q_s, q_rope_s, smem,
                    N, F, R, HALVES, STEP, STAGES, ROPES,
                )  # fmt: skip
                step += 1
            i = gl.arange(0, F, query_lay)
            sum_of_query = gl.convert_layout(gl.sum(gl.sum(total, 1), 0), query_lay)
            finish_piece(sum_of_query, top, 1.0 / shrink, i, slot, pieces, token, row0, rows, lse, smem, N)
            pieces += 1


@gluon.jit
def _add_step(
    b, acc, step, known, smem, half: gl.constexpr, F: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Add half of a step's values times weights. Codes become float16 while weights, or products, are waited for."""
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    flag_lay: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    STEP_KEYS: gl.constexpr = STEP * BLOCK
    # At once, and products still on their way: as many as there are registers for.
    KEYS: gl.constexpr = BLOCK if F == 16 else BLOCK // 2
    BEFORE: gl.constexpr = 1 if F == 16 else 0
    acc0, acc1, acc2, acc3 = acc
    stage, phase, _ = ring(step, STAGES)
    values = smem.k.index(2 * stage + half)
    mbarrier.wait(smem.k_full.index(2 * stage + half), phase)
    words = words_of_tile(b, 0, 0, values, known, KEYS, STEP_KEYS)
    mbarrier.wait(smem.weight_full, step & 1)
    if gl.max(smem.grew.load(flag_lay), 0) > 0:
        rescale = smem.factor.load(gl.SliceLayout(0, o_lay))[None, :]
        acc0 = acc0 * rescale
        acc1 = acc1 * rescale
        acc2 = acc2 * rescale
        acc3 = acc3 * rescale
    for at in gl.static_range(0, STEP_KEYS, KEYS):
        if at > 0:
            words = words_of_tile(b, at, 0, values, known, KEYS, STEP_KEYS)
        weight = smem.weight[2 * half].slice(at, KEYS, dim=0)
        acc0 = add_columns(acc0, words, weight, FIRST_PAIRS, 4, F, KEYS)
        acc0, acc3 = warpgroup_mma_wait(BEFORE, deps=[acc0, acc3])
        acc1 = add_columns(acc1, words, weight, LAST_PAIRS, 4, F, KEYS)
        words = words_of_tile(b, at, 1, values, known, KEYS, STEP_KEYS)
        acc0, acc1 = warpgroup_mma_wait(BEFORE, deps=[acc0, acc1])
        weight = smem.weight[2 * half + 1].slice(at, KEYS, dim=0)
        acc2 = add_columns(acc2, words, weight, FIRST_PAIRS, 4, F, KEYS)
        acc1, acc2 = warpgroup_mma_wait(BEFORE, deps=[acc1, acc2])
        acc3 = add_columns(acc3, words, weight, LAST_PAIRS, 4, F, KEYS)
        acc2, acc3 = warpgroup_mma_wait(BEFORE, deps=[acc2, acc3])
    mbarrier.arrive(smem.k_empty.index(2 * stage + half), count=1)
    acc0, acc1, acc2, acc3 = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, acc3])
    mbarrier.arrive(smem.weight_empty, count=1)
    return acc0, acc1, acc2, acc3


@gluon.jit
def accumulate(
    out, work, smem, half: gl.constexpr, N: gl.constexpr, F: gl.constexpr, RAGGED: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: a half of values times weights."""
    shared, lengths = work
    row0 = gl.program_id(0) * F
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    step = 0
    pieces = 0
    for request in range(shared[0], shared[2] + 1):
        begin, end, seq_len, token, _, rows, slot, _ = piece(
            request, shared, lengths, gl.program_id(1), row0, 0, N, F, RAGGED, 0
        )
        if rows > 0:
            known = gl.minimum(seq_len, end * BLOCK)
            nothing = gl.zeros([HALF // 4, F], gl.float32, o_lay)
            acc0, acc1, acc2, acc3 = nothing, nothing, nothing, nothing
            for b in range(begin, end, STEP):
                acc0, acc1, acc2, acc3 = _add_step(
                    b, (acc0, acc1, acc2, acc3), step, known, smem, half, F, STEP, STAGES
                )
                step += 1
            mbarrier.wait(smem.last_full, pieces & 1)
            last = smem.last.load(gl.SliceLayout(0, o_lay))[None, :]
            mbarrier.arrive(smem.last_empty, count=1)
            pieces += 1
            column = half * HALF
            store_tile(acc0 * last, acc1 * last, column, slot, out, row0, rows, token, N, F)
            store_tile(acc2 * last, acc3 * last, column + HALF // 2, slot, out, row0, rows, token, N, F)
