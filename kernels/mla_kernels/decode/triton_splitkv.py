"""Split-KV absorbed decode in Triton: any GPU that Triton supports, and its CPU interpreter.

All query tokens and heads of a request are rows of one tile, so its cache is read once a request; values are the
latent part of the key tile already loaded, in the dtype of the queries if the cache is fp8, and times their tile's
scale if it is tile-scaled. Requests are cut into pieces of nearly equal length from the sequence lengths *on the
device*: a captured graph adapts to every batch, and scratch depends on the GPU alone.
  1. Each program finds its piece, runs an online softmax over it, and writes the answer, or a partial one if the
     request was cut.
  2. Each program of a second kernel merges the partial answers of a query row by their log-sum-exp.
With `split_tokens` pieces are fixed splits (splits.py), and programs take turns at them.
"""

import torch
import triton
import triton.language as tl

from mla_kernels.cache_layout import packed_row
from mla_kernels.device import Device, device_of
from mla_kernels.launching import launch
from mla_kernels.primitives import (
    E4M3,
    LN_2,
    LOG2_E,
    PACKED,
    as_codes,
    cdiv,
    decode_outputs,
    next_power_of_2,
    reaching_all,
    refusals,
    require_adjacent,
    scratch,
)
from mla_kernels.splits import merge_columns, merge_splits, prepare, reserved_rows, shapes
from mla_kernels.tiles import DecodeTile, decode_tile
from mla_kernels.triton_piece import answer, query_tokens

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages in the pool, G tokens a
# page, M pages a request, S pieces. In kernels: `row` = query token within the request * N + head.

_CODES = (E4M3, PACKED)  # dtypes of caches whose values are converted before they are multiplied
_MERGE_PROGRAMS, _MERGE_COLUMNS, _MERGE_VALUES = 512, 32, 2048  # programs wanted, columns at least, values at once


def unsupported(problem, device: Device) -> list[str]:
    reasons = refusals(device, queries=problem.dtype, cache=problem.layout.format.dtype)
    if problem.layout.format.dtype not in (problem.dtype, *_CODES):
        reasons.append(f"cache must be fp8 or as queries, got {problem.dtype} queries and {problem.layout.format.name}")
    latent = problem.geometry.kv_lora_rank
    if latent & (latent - 1) or not 128 <= latent <= 512:
        reasons.append(f"kv_lora_rank must be a power of two from 128 to 512, got {latent}")
    if problem.geometry.qk_rope_head_dim > 128:
        reasons.append(f"qk_rope_head_dim must be 128 or less, got {problem.geometry.qk_rope_head_dim}")
    return reasons


@triton.jit
def _piece(seq_lens_ptr, item, batch, pieces_wanted, B_PAD: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which part of which request program `item` works on.

    Every request is cut into ceil(its tiles / c) pieces with c = ceil(all tiles / pieces_wanted), so there are at most
    pieces_wanted + batch. Returns (request, its length, piece, pieces of the request, slot of the request's first
    partial result, whether there is such an item). Only requests of two or more pieces take slots: at most 2 *
    pieces_wanted of them.
    """
    b = tl.arange(0, B_PAD)
    lens = tl.load(seq_lens_ptr + b, mask=b < batch, other=0)
    tiles = tl.cdiv(lens, BLOCK_T)
    tiles_per_piece = tl.maximum(tl.cdiv(tl.sum(tiles), pieces_wanted), 1)
    pieces = tl.where(b < batch, tl.maximum(tl.cdiv(tiles, tiles_per_piece), 1), 0)
    last = tl.cumsum(pieces, 0)
    request = tl.sum((last <= item).to(tl.int32))
    mine = b == request
    cut = tl.where(pieces > 1, pieces, 0)
    my_pieces = tl.sum(tl.where(mine, pieces, 0))
    piece = item - tl.sum(tl.where(mine, last - pieces, 0))
    slot = tl.sum(tl.where(mine, tl.cumsum(cut, 0) - cut, 0))
    return request, tl.sum(tl.where(mine, lens, 0)), piece, my_pieces, slot, request < batch


@triton.jit(
    do_not_specialize=["query_len", "batch", "pieces_wanted", "stride_table", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_ptr", "plan_ptr"],
)
def _splitkv_kernel(
    q_latent_ptr, q_rope_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, query_start_ptr, out_ptr, lse_ptr,
    part_ptr, part_lse_ptr, plan_ptr, cache_scale_ptr, scale_log2, query_len, batch, pieces_wanted,
    stride_ql_t, stride_ql_n, stride_qr_t, stride_qr_n, stride_page, stride_token, stride_table,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: tl.constexpr, L: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    RAGGED: tl.constexpr, B_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
    ROPE_AT: tl.constexpr,
):  # fmt: skip
    item, row_tile = tl.program_id(1), tl.program_id(0)
    request, seq_len, piece, pieces, slot, exists = _piece(seq_lens_ptr, item, batch, pieces_wanted, B_PAD, BLOCK_T)
    if not exists:
        return
    first_token, tokens = query_tokens(query_start_ptr, request, query_len, RAGGED)
    if (piece == 0) & (row_tile == 0):
        tl.store(plan_ptr + request * 2, pieces)
        tl.store(plan_ptr + request * 2 + 1, slot)
    if row_tile * BLOCK_M >= tokens * N:
        return

    answer(
        request, seq_len, piece, pieces, slot, 0, row_tile, first_token, tokens, tokens,
        (q_latent_ptr, q_rope_ptr, stride_ql_t, stride_ql_n, stride_qr_t, stride_qr_n),
        (cache_ptr, block_table_ptr, cache_scale_ptr, stride_page, stride_token, stride_table),
        (out_ptr, lse_ptr, stride_out_t, stride_out_n, stride_lse_t, stride_lse_n),
        (part_ptr, part_lse_ptr), scale_log2, N, L, R, R_PAD, PAGE, BLOCK_M, BLOCK_T, UPCAST, ROPE_AT, 0,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["query_len", "batch", "window", "turn", "stride_table", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_ptr", "lse_ptr"],
)
def _fixed_splits_kernel(
    q_latent_ptr, q_rope_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, query_start_ptr, out_ptr, lse_ptr,
    part_ptr, part_lse_ptr, cache_scale_ptr, scale_log2, query_len, batch, window, turn,
    stride_ql_t, stride_ql_n, stride_qr_t, stride_qr_n, stride_page, stride_token, stride_table,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: tl.constexpr, L: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    RAGGED: tl.constexpr, B_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
    ROPE_AT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Programs share the splits of a turn: see splits.py."""
    row_tile, b = tl.program_id(0), tl.arange(0, B_PAD)
    lens = tl.load(seq_lens_ptr + b, mask=b < batch, other=0)
    splits = tl.where(b < batch, tl.maximum(tl.cdiv(lens, SPLIT), 1), 0)
    end = tl.cumsum(splits, 0)
    first = tl.sum(tl.where(end - splits < turn * window, splits, 0))
    stop = tl.sum(tl.where(end - splits < (turn + 1) * window, splits, 0))
    for item in range(first + tl.program_id(1), stop, tl.num_programs(1)):
        request = tl.sum((end <= item).to(tl.int32))
        mine = b == request
        seq_len, pieces = tl.sum(tl.where(mine, lens, 0)), tl.sum(tl.where(mine, splits, 0))
        piece = item - tl.sum(tl.where(mine, end - splits, 0))
        first_token, tokens = query_tokens(query_start_ptr, request, query_len, RAGGED)
        announced = tl.minimum(tokens, query_len)  # others have no scratch
        if row_tile * BLOCK_M < announced * N:
            answer(
                request, seq_len, piece, pieces, item - turn * window, query_len * N, row_tile,
                first_token, tokens, announced,
                (q_latent_ptr, q_rope_ptr, stride_ql_t, stride_ql_n, stride_qr_t, stride_qr_n),
                (cache_ptr, block_table_ptr, cache_scale_ptr, stride_page, stride_token, stride_table),
                (out_ptr, lse_ptr, stride_out_t, stride_out_n, stride_lse_t, stride_lse_n),
                (part_ptr, part_lse_ptr), scale_log2, N, L, R, R_PAD, PAGE, BLOCK_M, BLOCK_T, UPCAST, ROPE_AT, SPLIT,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["query_len", "rows_per_slot", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["query_start_ptr", "plan_ptr"],
)
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, plan_ptr, query_start_ptr, query_len, rows_per_slot,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: tl.constexpr, L: tl.constexpr, RAGGED: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, request, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pieces, slot = tl.load(plan_ptr + request * 2), tl.load(plan_ptr + request * 2 + 1)
    first_token, tokens = query_tokens(query_start_ptr, request, query_len, RAGGED)
    if (pieces == 1) | (row >= tokens * N):
        return

    s, c = tl.arange(0, BLOCK_S), column * COLUMNS + tl.arange(0, COLUMNS)
    at_first = slot.to(tl.int64) * rows_per_slot + row
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, pieces, BLOCK_S):
        here = begin + s < pieces
        at = at_first + (begin + s).to(tl.int64) * rows_per_slot
        lse = tl.load(part_lse_ptr + at, mask=here, other=-float("inf"))
        part = tl.load(part_ptr + at[:, None] * L + c[None, :], mask=here[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        weight = tl.exp2(lse - shift)
        total = total * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(part * weight[:, None], 0)
        top = new_top

    total = tl.where(total > 0, total, 1.0)
    out = acc / total
    token, head = (first_token + row // N).to(tl.int64), (row % N).to(tl.int64)
    tl.store(out_ptr + token * stride_out_t + head * stride_out_n + c, out.to(out_ptr.dtype.element_ty))
    if column == 0:
        tl.store(lse_ptr + token * stride_lse_t + head * stride_lse_n, (top + tl.log2(total)) * LN_2)


def _row_tiles_and_pieces(rows: int, tile: DecodeTile, device: Device) -> tuple[int, int]:
    """Tiles that the query rows of a request take, and pieces to cut the batch's cache into for each."""
    row_tiles = cdiv(rows, tile.rows)
    return row_tiles, max(1, device.num_sms * tile.pieces_per_sm // row_tiles)


def _scratch_rows(rows: int, row_values: int, itemsize: int, device: Device, fp8: bool = False) -> int:
    tile = decode_tile(rows, row_values, itemsize, device, fp8)
    row_tiles, pieces = _row_tiles_and_pieces(rows, tile, device)
    return 2 * pieces * row_tiles * tile.rows if pieces > 1 else 0  # one piece for the batch: no request is cut


def workspace(problem, device: Device, *, max_requests: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """(shape, dtype) of the scratch tensors that `run` takes, for up to `max_requests` requests.

    Partial outputs, their base-2 LSE, and two integers a request. The first two depend on the GPU and the tile alone;
    with fixed splits they are as splits.py says, and there are no integers.
    """
    most = problem.geometry.num_heads * problem.max_query_len
    layout = problem.layout
    if problem.split_tokens:
        return shapes(
            reserved_rows(most, max_requests, problem.max_seq_len, problem.split_tokens), layout.geometry.kv_lora_rank
        )
    sizes = (problem.geometry.latent_dim, problem.dtype.itemsize, device, layout.format.dtype in _CODES)
    rows = max(_scratch_rows(min(rows, most), *sizes) for rows in (16, 32, 64, most))
    return _scratch_shapes(rows, problem.geometry.kv_lora_rank, max_requests)


def _scratch_shapes(rows: int, latent: int, requests: int):
    return ((rows * latent,), torch.float32), ((rows,), torch.float32), ((2 * requests,), torch.int32)


def run(
    q_latent_TNL,
    q_rope_TNR,
    cache_AGK,
    block_table_BM,
    seq_lens_B,
    *,
    scale,
    query_len=1,
    query_start_B1=None,
    out_TNL=None,
    lse_TN=None,
    workspace=None,
    cache_scale=None,
    split_tokens=None,
):
    """Same contract as reference.decode, but rows of `out_TNL` that no request owns keep what they held."""
    T, N, L = q_latent_TNL.shape
    B, R = seq_lens_B.shape[0], q_rope_TNR.shape[-1]
    ragged = query_start_B1 is not None
    out_TNL, lse_TN = decode_outputs(q_latent_TNL, B, query_len, ragged=ragged, out_TNL=out_TNL, lse_TN=lse_TN)
    require_adjacent(q_latent=q_latent_TNL, q_rope=q_rope_TNR, cache=cache_AGK, block_table=block_table_BM)
    device = device_of(cache_AGK)
    if B == 0 or T == 0:
        return out_TNL, lse_TN

    rows = query_len * N if split_tokens is None else N  # tiles of other heights may have other bits
    sizes = (rows, L + R, q_latent_TNL.element_size(), device, cache_AGK.dtype in _CODES)
    tile, packed = decode_tile(*sizes), packed_row(cache_AGK, L + R)
    starts = query_start_B1 if ragged else seq_lens_B  # not read when every request has query_len tokens
    inputs = (q_latent_TNL, q_rope_TNR, as_codes(cache_AGK), block_table_BM, seq_lens_B, starts, out_TNL, lse_TN)
    out_strides = (out_TNL.stride(0), out_TNL.stride(1), lse_TN.stride(0), lse_TN.stride(1))
    strides = (
        q_latent_TNL.stride(0), q_latent_TNL.stride(1), q_rope_TNR.stride(0), q_rope_TNR.stride(1),
        cache_AGK.stride(0), cache_AGK.stride(1), block_table_BM.stride(0), *out_strides,
    )  # fmt: skip
    common = {"N": N, "L": L, "RAGGED": ragged}
    constants = common | {
        "R": R, "R_PAD": max(16, next_power_of_2(R)), "PAGE": cache_AGK.shape[1], "B_PAD": _batch_bucket(B),
        "BLOCK_M": tile.rows, "BLOCK_T": tile.tokens, "UPCAST": device.interpreted,
        "ROPE_AT": packed.rope_at if packed else 0, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    row_tiles, pieces = _row_tiles_and_pieces(query_len * N, tile, device)
    if split_tokens is None:
        needed = _scratch_shapes(_scratch_rows(*sizes), L, B)
        part, part_lse, plan = scratch(workspace, needed, cache_AGK.device)
        launch(
            _splitkv_kernel, (row_tiles, pieces + B),
            *inputs, part, part_lse, plan, cache_scale, scale * LOG2_E.value, query_len, B, pieces, *strides,
            **constants,
        )  # fmt: skip
        columns = _merge_columns(L, B * query_len * N)
        launch(
            _merge_kernel, (query_len * N, B, L // columns),
            out_TNL, lse_TN, part, part_lse, plan, starts, query_len, row_tiles * tile.rows, *out_strides,
            BLOCK_S=_MERGE_VALUES // columns, COLUMNS=columns, **common, num_warps=4,
        )  # fmt: skip
        return out_TNL, lse_TN

    part, part_lse, turns = prepare(workspace, (query_len * N, L), block_table_BM, cache_AGK, split_tokens=split_tokens)
    for turn in range(turns.count):
        launch(
            _fixed_splits_kernel, (row_tiles, min(pieces, turns.most_splits)),
            *inputs, part, part_lse, cache_scale, scale * LOG2_E.value, query_len, B, turns.window, turn, *strides,
            SPLIT=split_tokens, **constants,
        )  # fmt: skip
        merge_splits(
            out_TNL, lse_TN, part, part_lse, seq_lens_B, query_start_B1,
            query_len=query_len, split_tokens=split_tokens, turns=turns, turn=turn, device=device, overlap=False,
        )  # fmt: skip
    return out_TNL, lse_TN


def variants(problem, device: Device, *, max_requests: int, query_lens) -> list[tuple[int, int]]:
    """(requests, query tokens of each) of calls that between them take every form that kernels have for up to
    `max_requests` requests of any of `query_lens` tokens."""
    layout, heads, latent = problem.layout, problem.geometry.num_heads, problem.geometry.kv_lora_rank
    sizes = (problem.geometry.latent_dim, problem.dtype.itemsize, device, layout.format.dtype in _CODES)

    def forms(requests, query_len):
        rows = query_len * heads
        if problem.split_tokens:  # tiles go by the heads alone
            return ("splits", _batch_bucket(requests)), ("merge", merge_columns(requests, rows, latent))
        return (decode_tile(rows, *sizes), _batch_bucket(requests)), ("merge", _merge_columns(latent, requests * rows))

    return reaching_all(forms, max_requests, query_lens)


def _merge_columns(latent: int, rows: int) -> int:
    """Few query rows: several programs share one, each merges some columns of many pieces at a time."""
    return min(latent, max(_MERGE_COLUMNS, next_power_of_2(latent * rows // _MERGE_PROGRAMS)))


def _batch_bucket(batch: int) -> int:
    """Width of the scan over requests: a few sizes, so that a new batch size seldom compiles a new kernel."""
    width = 16
    while width < batch:
        width *= 8 if width < 1024 else 2
    return width
