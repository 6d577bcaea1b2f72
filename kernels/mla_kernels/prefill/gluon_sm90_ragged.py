"""Ragged prefill attention over expanded heads for Hopper in Gluon: persistent, warp-specialised.

One program an SM takes tiles of 128 queries of a head, longest first, as it gets done with others. One warp copies
queries, keys and values by TMA, from where the projection left them: keys are never concatenated. Two warpgroups have
64 of the queries each and take turns on the tensor cores (hopper_prefill_load.py, hopper_prefill.py).

Where tiles are so few that half of the SMs or more had none, each tile's keys are cut into pieces with a program each,
whose answers a second kernel merges (prefill_pieces.py).
"""

from functools import lru_cache
from typing import NamedTuple

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
from mla_kernels.repeats import repeat
from mla_kernels.tma import describe

# Shape suffixes: T query tokens, S keys, B requests, N heads, P nope, R rope, Q = P + R, V value. Buffers in shared
# memory end in _s.

# Of keys and values that run side by side. Measured on an H200: with 16 to 48 MiB, which its L2 holds too, 4 x 4096
# tokens and 128 heads took 11 to 15 % longer.
_L2_BYTES = 8 << 20

TAKES_COUNTER = True  # `run` has the option `counter`


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


class _Rows(NamedTuple):
    """A tensor [rows, N, width], but for where it lies."""

    dtype: torch.dtype
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]

    @property
    def adjacent(self) -> bool:
        return self.strides[-1] == 1 or self.shape[-1] <= 1

    @property
    def columns(self) -> int:
        """Those of all heads."""
        (_, heads, width), (_, stride, _) = self.shape, self.strides
        return (heads - 1) * stride + width

    @property
    def fits_tma(self) -> bool:
        """TMA wants rows at multiples of 16 bytes, none inside another, and columns that 31 bits hold."""
        row_stride = self.strides[0]
        return row_stride % 8 == 0 and self.columns <= row_stride and self.columns < 2**31

    def in_boxes(self, rows: int, columns: int) -> tuple:
        """What `describe` wants to know beside the address, of the tensor as rows of all heads."""
        return self.dtype, (self.shape[0], self.columns), self.strides[0], (rows, columns)


def _rows_of(x) -> _Rows:
    return _Rows(x.dtype, x.shape, x.stride())


def _for_tma(x):
    """`x`, or a copy where TMA cannot go."""
    if x.data_ptr() % 16 == 0 and _rows_of(x).fits_tma:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    if not _rows_of(copy).fits_tma:
        raise ValueError(f"rows of all heads must be of multiples of 8 values, got {tuple(x.shape)}; see `unsupported`")
    return copy


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


class _Plan(NamedTuple):
    """What calls of the same tensors, but for where these lie, have in common: those of a step's layers, say.

    adjacent, fit_tma: whether values of a row are adjacent, and TMA can go where all rows lie.
    q, nope, rope, v: what descriptors of queries, both parts of keys, and values are made of beside addresses.
    answers: (shape, dtype) of what pieces of keys answer; none where keys are not cut.
    """

    adjacent: bool
    fit_tma: bool
    programs: int
    pieces: int
    q: tuple
    nope: tuple
    rope: tuple
    v: tuple
    strides: tuple[int, int, int, int]
    group_keys: int
    answers: tuple
    constants: dict


@lru_cache(256)
def _plan(device: Device, q, nope, rope, v, out, requests: int, causal: bool, accumulate: bool, pieces: int | None):
    """q, nope, rope, v, out: fields of _Rows."""
    q, nope, rope, v, out = (_Rows(*x) for x in (q, nope, rope, v, out))
    (T, N, Q), P, (S, _, V) = q.shape, nope.shape[-1], v.shape
    block = _block(device, Q, V)
    tiles = _most_tiles(T, requests, N)
    pieces = pieces or pieces_of(tiles, S, device.num_sms)
    cut = pieces > 1
    return _Plan(
        adjacent=all(x.adjacent for x in (q, nope, rope, v, out)),
        fit_tma=all(x.fits_tma for x in (q, nope, rope, v)),
        programs=tiles * pieces if cut else device.num_sms,
        pieces=pieces,
        q=q.in_boxes(ROWS.value, COLUMNS.value),
        nope=nope.in_boxes(block, COLUMNS.value),
        rope=rope.in_boxes(block, COLUMNS.value),
        v=v.in_boxes(block, V),
        strides=tuple(x.strides[1] for x in (q, nope, rope, v)),
        group_keys=_L2_BYTES // (2 * (P + V)),
        answers=shapes(pieces, T, N, V) if cut else (),
        constants={
            "C": Q // COLUMNS.value, "R": Q - P, "V": V, "BLOCK": block, "CAUSAL": causal,
            "ACCUMULATE": accumulate and not cut, "CUT": cut, "LOADER_REGS": 24, "num_warps": 4,
        },
    )  # fmt: skip


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
    counter=None,
):
    """Same contract as reference.prefill, but rows of `out_TNV` that no request owns keep what they held.

    All tensors may be strided, less the last dimension of queries, keys, values and output. `scale` is positive.
    pieces: that each tile's keys are cut into, each with a program of its own. None is as many as the GPU has room for.
    counter: an int32 of 0, which is another number afterwards. None is one that the call fills itself.
    """
    out_TNV, lse_TN = prefill_outputs(q_TNQ, v_SNV.shape[-1], out_TNV, lse_TN, accumulate=accumulate)
    tokens, requests = q_TNQ.shape[0], query_start_B1.shape[0] - 1
    if tokens == 0 or requests == 0:
        return out_TNV, lse_TN
    if v_SNV.shape[0] == 0:
        if not accumulate:
            lse_TN.fill_(-torch.inf)
        return out_TNV.masked_fill_((lse_TN == -torch.inf)[..., None], 0.0), lse_TN
    own_keys = key_start_B1 is query_start_B1
    repeat(
        _launch_all, (scale, causal, accumulate, pieces),
        (q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, None if own_keys else key_start_B1, out_TNV, lse_TN,
         counter),
    )  # fmt: skip
    return out_TNV, lse_TN


def _launch_all(
    scale, causal, accumulate, pieces,
    q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, key_start_B1, out_TNV, lse_TN, counter,
) -> None:  # fmt: skip
    """key_start_B1: None where it is query_start_B1."""
    tokens, requests = q_TNQ.shape[0], query_start_B1.shape[0] - 1
    if k_rope_SNR.shape[-1] == 0:
        k_rope_SNR = k_nope_SNP
    plan = _plan(
        device_of(q_TNQ),
        (q_TNQ.dtype, q_TNQ.shape, q_TNQ.stride()),
        (k_nope_SNP.dtype, k_nope_SNP.shape, k_nope_SNP.stride()),
        (k_rope_SNR.dtype, k_rope_SNR.shape, k_rope_SNR.stride()),
        (v_SNV.dtype, v_SNV.shape, v_SNV.stride()),
        (out_TNV.dtype, out_TNV.shape, out_TNV.stride()),
        requests, causal, accumulate, pieces,
    )  # fmt: skip
    if not plan.adjacent:
        require_adjacent(q=q_TNQ, k_nope=k_nope_SNP, k_rope=k_rope_SNR, v=v_SNV, out=out_TNV)
    q, nope, rope, v = q_TNQ.data_ptr(), k_nope_SNP.data_ptr(), k_rope_SNR.data_ptr(), v_SNV.data_ptr()
    if not plan.fit_tma or (q | nope | rope | v) % 16:
        _launch_all(
            scale, causal, accumulate, pieces, *map(_for_tma, (q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV)),
            query_start_B1, key_start_B1, out_TNV, lse_TN, counter,
        )  # fmt: skip
        return
    if plan.answers:
        claimed = query_start_B1  # nothing is claimed
        into = scratch(None, plan.answers, q_TNQ.device)
    else:
        # Never left zero by the launch before: none would recover from memory that an engine took away.
        claimed = torch.zeros(1, dtype=torch.int32, device=q_TNQ.device) if counter is None else counter
        into = out_TNV, lse_TN
    launch(
        _prefill_kernel, (plan.programs,),
        describe(q, *plan.q), describe(nope, *plan.nope), describe(rope, *plan.rope), describe(v, *plan.v),
        *plan.strides, query_start_B1, query_start_B1 if key_start_B1 is None else key_start_B1,
        requests, q_TNQ.shape[1], claimed, plan.group_keys, plan.pieces, tokens, scale * LOG2_E.value,
        into[0], *into[0].stride()[:2], into[1], *into[1].stride(), **plan.constants,
    )  # fmt: skip
    if plan.answers:
        merge_pieces(
            out_TNV, lse_TN, *into, query_start_B1, pieces=plan.pieces, accumulate=accumulate, overlap=True
        )  # fmt: skip
