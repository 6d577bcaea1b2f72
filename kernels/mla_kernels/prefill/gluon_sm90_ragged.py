"""Ragged prefill attention over expanded heads for Hopper in Gluon: persistent, warp-specialised.

One program an SM takes tiles of 128 queries of a head, longest first, as it gets done with others. One warp copies
queries, keys and values by TMA, from where the projection left them: keys are never concatenated. Two warpgroups have
64 of the queries each and take turns on the tensor cores (hopper_prefill_load.py, hopper_prefill.py).

Where tiles are so few that half of the SMs or more had none, each tile's keys are cut into pieces with a program each,
whose answers a second kernel merges (prefill_pieces.py).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from mla_kernels.cache_layout import tensor_bytes
from mla_kernels.device import Device, device_of
from mla_kernels.hopper import SWIZZLED, barrier, device_refusals
from mla_kernels.hopper_prefill import attend
from mla_kernels.hopper_prefill_load import COLUMNS, FIELDS, ROWS, TILE_ROWS, Batch, Shared, load
from mla_kernels.launching import launch
from mla_kernels.prefill_pieces import LEAST_KEYS, merge_pieces, pieces_of, shapes
from mla_kernels.primitives import LOG2_E, prefill_outputs, require_adjacent, scratch
from mla_kernels.tma import describe

# Shape suffixes: T query tokens, S keys, B requests, N heads, P nope, R rope, Q = P + R, V value. Buffers in shared
# memory end in _s.

# Of keys and values that run side by side. Measured on an H200: with 16 to 48 MiB, which its L2 holds too, 4 x 4096
# tokens and 128 heads took 11 to 15 % longer.
_L2_BYTES = 8 << 20


@gluon.jit(
    do_not_specialize=[
        "batch",
        "heads",
        "group_keys",
        "pieces",
        "tokens",
        "stride_q",
        "stride_nope",
        "stride_rope",
        "stride_v",
        "stride_lse_t",
        "stride_lse_n",
    ],
    do_not_specialize_on_alignment=["query_start_ptr", "key_start_ptr", "claimed_ptr", "lse_ptr"],  # of some tokens
)
def _prefill_kernel(
    q_desc, nope_desc, rope_desc, v_desc, stride_q, stride_nope, stride_rope, stride_v,
    query_start_ptr, key_start_ptr, batch, heads, claimed_ptr, group_keys, pieces, tokens, scale_log2,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    C: gl.constexpr, R: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
    ACCUMULATE: gl.constexpr, CUT: gl.constexpr, LOADER_REGS: gl.constexpr,
):  # fmt: skip
    if CUT:
        gdc_launch_dependents()
    dtype: gl.constexpr = q_desc.dtype
    bar_lay: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [2 * C, ROWS, COLUMNS], SWIZZLED)
    k_s = gl.allocate_shared_memory(dtype, [2 * C, BLOCK, COLUMNS], SWIZZLED)
    v_s = gl.allocate_shared_memory(dtype, [2, BLOCK, V], SWIZZLED)
    tile_s = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], bar_lay)
    for d in gl.static_range(2):
        mbarrier.init(q_full.index(d), count=1)
        mbarrier.init(q_empty.index(d), count=1)
        mbarrier.init(k_full.index(d), count=1)
        mbarrier.init(k_empty.index(d), count=2)
        mbarrier.init(v_full.index(d), count=1)
        mbarrier.init(v_empty.index(d), count=2)
        mbarrier.init(tile_full.index(d), count=1)
        mbarrier.init(turn.index(d), count=1)
    fence_async_shared()
    barrier()

    smem = Shared(
        q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, turn
    )  # fmt: skip
    out = (out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n)
    keys = (nope_desc, rope_desc, stride_nope, stride_rope)
    tiles = Batch(query_start_ptr, key_start_ptr, batch, heads, claimed_ptr, group_keys, pieces, tokens)
    gl.warp_specialize(
        [
            (attend, (out, scale_log2, smem, 0, C, V, BLOCK, CAUSAL, ACCUMULATE)),
            (attend, (out, scale_log2, smem, 1, C, V, BLOCK, CAUSAL, ACCUMULATE)),
            (load, ((q_desc, stride_q), keys, (v_desc, stride_v), tiles, smem, C, R, V, BLOCK, CAUSAL, CUT)),
        ],
        [4, 1],
        [240, LOADER_REGS],
    )


def _shared_bytes(parts: int, v_width: int, block: int) -> int:
    """Queries of a tile, two blocks of keys and values, barriers."""
    q_and_k = (2 * ROWS.value + 2 * block) * parts * COLUMNS.value
    return 2 * (q_and_k + 2 * block * v_width) + 1024


def _block(device: Device, qk_width: int, v_width: int) -> int | None:
    """Keys of a block: what fits in shared memory, and leaves a warpgroup registers for the output."""
    for block in (128, 64):
        fits = _shared_bytes(qk_width // COLUMNS.value, v_width, block) <= device.shared_bytes
        if fits and block + v_width <= 320:
            return block
    return None


def unsupported(problem, device: Device) -> list[str]:
    reasons = device_refusals(device)
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"queries must be bfloat16 or float16, got {problem.dtype}")
    geometry = problem.geometry
    nope, rope, v = geometry.qk_nope_head_dim, geometry.qk_rope_head_dim, geometry.v_head_dim
    if nope % 64 or rope % 64 or nope + rope > 256:
        reasons.append(f"needs nope and rope of multiples of 64, 256 together at most, got {nope} + {rope}")
    if v not in (64, 128, 256):
        reasons.append(f"needs v of 64, 128 or 256, got {v}")
    return reasons


def _for_tma(x):
    """x [rows, N, width], or a copy where TMA cannot go: it wants rows at multiples of 16 bytes, none inside another,
    and columns, which are those of all heads, that 31 bits hold."""
    (_, heads, width), (row_stride, stride, _) = x.shape, x.stride()
    columns = (heads - 1) * stride + width
    if x.data_ptr() % 16 or row_stride % 8 or row_stride < columns or columns >= 2**31:
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _describe(x, box):
    """TMA descriptor of a tensor [rows, N, width] as rows of all heads."""
    (rows, heads, width), (row_stride, stride, _) = x.shape, x.stride()
    return describe(x.data_ptr(), x.dtype, (rows, (heads - 1) * stride + width), row_stride, box)


def _most_tiles(tokens: int, requests: int, heads: int) -> int:
    """Tiles of so many query tokens of so many requests, however these divide them."""
    begun = min(tokens, requests)
    return (tokens + begun * (TILE_ROWS.value - 1)) // TILE_ROWS.value * heads


def _is_cut(heads: int, num_sms: int, *, tokens: int, keys: int) -> bool:
    """Whether a call of one request is."""
    return pieces_of(_most_tiles(tokens, 1, heads), keys, num_sms) > 1


def variants(problem, device: Device, *, own_keys: bool) -> list[dict]:
    """Options of `run` with which calls between them take every form that it chooses by itself.

    own_keys: of queries that see each other alone: one has as many keys as there are.
    """
    keys = 2 * LEAST_KEYS
    tokens = keys if own_keys else 1
    cut = _is_cut(problem.geometry.num_heads, device.num_sms, tokens=tokens, keys=keys)
    return [{}, {"pieces": 2}] if cut else [{}]


def step_bytes(problem, device: Device, *, tokens: int, keys: int) -> int:
    """Bytes that a call takes at most beside arguments and outputs: answers of pieces to a tile, as many as SMs."""
    geometry = problem.geometry
    if not tokens or not _is_cut(geometry.num_heads, device.num_sms, tokens=1, keys=keys):
        return 0
    answers = shapes(device.num_sms, TILE_ROWS.value, 1, geometry.v_head_dim)
    return sum(tensor_bytes(shape, dtype) for shape, dtype in answers)


def run(
    q_TNQ,
    k_nope_SNP,
    k_rope_SNR,
    v_SNV,
    query_start_B1,
    key_start_B1,
    *,
    max_query_len,
    scale,
    causal,
    accumulate=False,
    out_TNV=None,
    lse_TN=None,
    pieces=None,
):
    """Same contract as reference.prefill, but rows of `out_TNV` that no request owns keep what they held.

    All tensors may be strided, less the last dimension of queries, keys, values and output. `scale` is positive.
    pieces: that each tile's keys are cut into, each with a program of its own. None is as many as the GPU has room for.
    """
    T, N, Q = q_TNQ.shape
    P, R, V = k_nope_SNP.shape[-1], k_rope_SNR.shape[-1], v_SNV.shape[-1]
    out_TNV, lse_TN = prefill_outputs(q_TNQ, V, out_TNV, lse_TN, accumulate=accumulate)
    require_adjacent(q=q_TNQ, k_nope=k_nope_SNP, k_rope=k_rope_SNR, v=v_SNV, out=out_TNV)
    B = len(query_start_B1) - 1
    if T == 0 or B == 0:
        return out_TNV, lse_TN
    if len(v_SNV) == 0:
        if not accumulate:
            lse_TN.fill_(-torch.inf)
        return out_TNV.masked_fill_((lse_TN == -torch.inf)[..., None], 0.0), lse_TN
    device = device_of(q_TNQ)
    block = _block(device, Q, V)
    q_TNQ, k_nope_SNP, v_SNV = _for_tma(q_TNQ), _for_tma(k_nope_SNP), _for_tma(v_SNV)
    k_rope_SNR = _for_tma(k_rope_SNR) if R else k_nope_SNP
    tiles = _most_tiles(T, B, N)
    pieces = pieces or pieces_of(tiles, len(v_SNV), device.num_sms)
    cut = pieces > 1
    if cut:
        programs, claimed = tiles * pieces, query_start_B1  # nothing is claimed
        into = scratch(None, shapes(pieces, T, N, V), q_TNQ.device)
    else:
        # Zeroed by each launch: one that relied on those before would never recover from memory that an engine took
        # away.
        programs, claimed = device.num_sms, torch.zeros(1, dtype=torch.int32, device=q_TNQ.device)
        into = out_TNV, lse_TN
    in_place = accumulate and not cut
    launch(
        _prefill_kernel, (programs,),
        _describe(q_TNQ, (ROWS.value, COLUMNS.value)),
        _describe(k_nope_SNP, (block, COLUMNS.value)),
        _describe(k_rope_SNR, (block, COLUMNS.value)),
        _describe(v_SNV, (block, V)),
        q_TNQ.stride(1), k_nope_SNP.stride(1), k_rope_SNR.stride(1), v_SNV.stride(1),
        query_start_B1, key_start_B1, B, N, claimed, _L2_BYTES // (2 * (P + V)), pieces, T, scale * LOG2_E.value,
        into[0], *into[0].stride()[:2], into[1], *into[1].stride(),
        C=Q // COLUMNS.value, R=R, V=V, BLOCK=block, CAUSAL=causal, ACCUMULATE=in_place, CUT=cut,
        LOADER_REGS=24, num_warps=4,
    )  # fmt: skip
    if cut:
        merge_pieces(out_TNV, lse_TN, *into, query_start_B1, pieces=pieces, accumulate=accumulate, overlap=True)
    return out_TNV, lse_TN
