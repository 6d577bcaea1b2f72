"""Shared memory of the Hopper decode kernels: buffers that roles hand on, and barriers that say whose they are."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mla_kernels.hopper import NARROW, SWIZZLED, SWIZZLED_CODES
from mla_kernels.hopper_load import HALF, TILE
from mla_kernels.schedule import BLOCK

QUERIES = gl.constexpr(64)  # of two warpgroups that take turns


class Shared(NamedTuple):
    """What the roles share: buffers, and barriers that say when they are full or empty."""

    k: object  # [4, 64, 256], latent part of two blocks, half by half; of codes, of a step for each stage
    k_rope: object  # [2, 64, 64], or of codes with as many columns behind them that are none
    weight: object  # [64, 64], softmax weights of a block, or of a step of codes
    factor: object  # [64], what outputs have to be multiplied with before the block
    grew: object  # [1], whether anything has to
    last: object  # [64], what outputs have to be multiplied with in the end
    k_full: object
    k_empty: object
    weight_full: object
    weight_empty: object
    last_full: object
    last_empty: object


@gluon.jit
def allocate(
    dtype: gl.constexpr, QUERIES: gl.constexpr, WEIGHT: gl.constexpr, WEIGHT_LAY: gl.constexpr, GATHER: gl.constexpr,
    STAGES: gl.constexpr = 2, CODES: gl.constexpr = 0,
):  # fmt: skip
    """Shared memory with its barriers ready: (Shared, latent part of QUERIES queries in two halves, rotary part).

    WEIGHT, WEIGHT_LAY: rows and columns of a block's weights, and their layout.  GATHER: every thread of the loader
    says of its own rows that they are there.  CODES: blocks of a step of an fp8 cache (hopper_codes.py), where
    `attend`, too, says when it has read them; 0 for 16-bit keys.
    """
    KEYS: gl.constexpr = max(CODES, 1) * BLOCK
    key_type: gl.constexpr = gl.int8 if CODES else dtype
    key_lay: gl.constexpr = SWIZZLED_CODES if CODES else SWIZZLED
    bar_lay: gl.constexpr = mbarrier.MBarrierLayout()
    row_lay: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(key_type, [2 * STAGES, KEYS, HALF], key_lay)
    rope_s = gl.allocate_shared_memory(key_type, [STAGES, KEYS, 2 * TILE if CODES else TILE], key_lay)
    q_s = gl.allocate_shared_memory(dtype, [2, QUERIES, HALF], SWIZZLED)
    q_rope_s = gl.allocate_shared_memory(dtype, [QUERIES, TILE], SWIZZLED)
    weight_s = gl.allocate_shared_memory(dtype, WEIGHT, WEIGHT_LAY)
    factor_s = gl.allocate_shared_memory(gl.float32, [QUERIES], row_lay)
    last_s = gl.allocate_shared_memory(gl.float32, [QUERIES], row_lay)
    grew_s = gl.allocate_shared_memory(gl.int32, [1], row_lay)
    k_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], bar_lay)
    k_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], bar_lay)
    weight_full = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    weight_empty = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    last_full = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    last_empty = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    for d in gl.static_range(2 * STAGES):
        mbarrier.init(k_full.index(d), count=128 if GATHER else 1)
        mbarrier.init(k_empty.index(d), count=2 if CODES else 1)
    mbarrier.init(weight_full, count=1)
    mbarrier.init(weight_empty, count=1)
    mbarrier.init(last_full, count=1)
    mbarrier.init(last_empty, count=1)
    fence_async_shared()
    smem = Shared(
        k_s, rope_s, weight_s, factor_s, grew_s, last_s,
        k_full, k_empty, weight_full, weight_empty, last_full, last_empty,
    )  # fmt: skip
    return smem, q_s, q_rope_s


class Turns(NamedTuple):
    """What the roles share: buffers, and barriers that say when they are full or empty."""

    k: object  # [2 * stages, 64, 256], codes of blocks, half by half
    k_rope: object  # [stages, 64, 128], of which half are none
    weight: object  # [2, 64, 64], softmax weights of a block, of either warpgroup
    above: object  # [2, 4], of either one's block how far each warp's scores are above their references, at most
    factor: object  # [2, 64], if that is far: what outputs have to be multiplied with before the block
    minus_top: object  # [64], the queries' references, negated
    power: object  # [1], what queries were divided by
    sums: object  # [4, 64], of weights of either warpgroup's blocks, of every other piece
    k_full: object
    k_empty: object
    weight_full: object
    sums_full: object
    q_full: object


@gluon.jit
def allocate_turns(GATHER: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory with its barriers ready: (Turns, latent part of queries in two halves, rotary part)."""
    bar_lay: gl.constexpr = mbarrier.MBarrierLayout()
    row_lay: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weight_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_s = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BLOCK, HALF], SWIZZLED_CODES)
    rope_s = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK, 2 * TILE], SWIZZLED_CODES)
    q_s = gl.allocate_shared_memory(gl.float16, [2, QUERIES, HALF], SWIZZLED)
    q_rope_s = gl.allocate_shared_memory(gl.float16, [QUERIES, TILE], SWIZZLED)
    weight_s = gl.allocate_shared_memory(gl.float16, [2, BLOCK, QUERIES], weight_lay)
    above_s = gl.allocate_shared_memory(gl.float32, [2, 4], row_lay)
    factor_s = gl.allocate_shared_memory(gl.float32, [2, QUERIES], row_lay)
    minus_top_s = gl.allocate_shared_memory(gl.float32, [QUERIES], row_lay)
    power_s = gl.allocate_shared_memory(gl.float32, [1], row_lay)
    sums_s = gl.allocate_shared_memory(gl.float32, [4, QUERIES], row_lay)
    k_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], bar_lay)
    k_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], bar_lay)
    weight_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    sums_full = gl.allocate_shared_memory(gl.int64, [4, 1], bar_lay)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    for d in gl.static_range(2 * STAGES):
        mbarrier.init(k_full.index(d), count=128 if GATHER else 1)
        mbarrier.init(k_empty.index(d), count=2)  # who takes scores, and who adds this half up
    for d in gl.static_range(2):
        mbarrier.init(weight_full.index(d), count=1)
    for d in gl.static_range(4):
        mbarrier.init(sums_full.index(d), count=1)
    mbarrier.init(q_full, count=1)
    fence_async_shared()
    smem = Turns(
        k_s, rope_s, weight_s, above_s, factor_s, minus_top_s, power_s, sums_s,
        k_full, k_empty, weight_full, sums_full, q_full,
    )  # fmt: skip
    return smem, q_s, q_rope_s


class Tiles(NamedTuple):
    """What the roles share: buffers, and barriers that say when they are full or empty."""

    k: object  # [2 * stages, keys of a step, 256], codes, half by half
    k_scale: object  # [stages, keys, 16], bytes of their scales; full and empty with the first half
    k_rope: object  # [ropes, keys, 128], bytes of rotary values
    weight: object  # four of [keys, queries], softmax weights of a step times scales, tile by tile
    factor: object  # [queries], what outputs have to be multiplied with before the step
    grew: object  # [1], whether anything has to
    last: object  # [queries], what outputs have to be multiplied with in the end
    k_full: object
    k_empty: object
    rope_full: object
    rope_empty: object
    weight_full: object
    weight_empty: object
    last_full: object
    last_empty: object


@gluon.jit
def allocate_tiles(
    dtype: gl.constexpr, F: gl.constexpr, GATHER: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    ROPES: gl.constexpr,
):  # fmt: skip
    """Shared memory with its barriers ready: (Tiles, latent part of F queries of `dtype` in two halves, rotary part as
    bfloat16, of float16 as a sum of two)."""
    KEYS: gl.constexpr = STEP * BLOCK
    bar_lay: gl.constexpr = mbarrier.MBarrierLayout()
    row_lay: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weight_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * F, element_bitwidth=16, rank=2)
    k_s = gl.allocate_shared_memory(gl.int8, [2 * STAGES, KEYS, HALF], SWIZZLED_CODES)
    scale_s = gl.allocate_shared_memory(gl.int8, [STAGES, KEYS, 16], NARROW)
    rope_s = gl.allocate_shared_memory(gl.int8, [ROPES, KEYS, 2 * TILE], SWIZZLED_CODES)
    q_s = gl.allocate_shared_memory(gl.float16, [2, F, HALF], SWIZZLED)
    q_rope_s = gl.allocate_shared_memory(gl.bfloat16, [2 if dtype == gl.float16 else 1, F, TILE], SWIZZLED)
    # One buffer would have barriers between writes to its parts, which Triton takes for the same.
    weight0 = gl.allocate_shared_memory(gl.float16, [KEYS, F], weight_lay)
    weight1 = gl.allocate_shared_memory(gl.float16, [KEYS, F], weight_lay)
    weight2 = gl.allocate_shared_memory(gl.float16, [KEYS, F], weight_lay)
    weight3 = gl.allocate_shared_memory(gl.float16, [KEYS, F], weight_lay)
    factor_s = gl.allocate_shared_memory(gl.float32, [F], row_lay)
    last_s = gl.allocate_shared_memory(gl.float32, [F], row_lay)
    grew_s = gl.allocate_shared_memory(gl.int32, [1], row_lay)
    k_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], bar_lay)
    k_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], bar_lay)
    rope_full = gl.allocate_shared_memory(gl.int64, [ROPES, 1], bar_lay)
    rope_empty = gl.allocate_shared_memory(gl.int64, [ROPES, 1], bar_lay)
    weight_full = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    weight_empty = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    last_full = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    last_empty = gl.allocate_shared_memory(gl.int64, [1], bar_lay)
    for d in gl.static_range(2 * STAGES):
        mbarrier.init(k_full.index(d), count=128 if GATHER else 1)
        mbarrier.init(k_empty.index(d), count=1)
    for d in gl.static_range(ROPES):
        mbarrier.init(rope_full.index(d), count=128 if GATHER else 1)
        mbarrier.init(rope_empty.index(d), count=1)
    mbarrier.init(weight_full, count=1)
    mbarrier.init(weight_empty, count=2)  # who adds either half up
    mbarrier.init(last_full, count=1)
    mbarrier.init(last_empty, count=2)
    fence_async_shared()
    smem = Tiles(
        k_s, scale_s, rope_s, (weight0, weight1, weight2, weight3), factor_s, grew_s, last_s,
        k_full, k_empty, rope_full, rope_empty, weight_full, weight_empty, last_full, last_empty,
    )  # fmt: skip
    return smem, q_s, q_rope_s
