"""What a program of the portable decode does with one piece of one request's cache."""

import triton
import triton.language as tl

from mla_kernels.cache_layout import TILE
from mla_kernels.primitives import (
    LN_2,
    dot,
    dot_operand,
    from_cache,
    load_packed_rope,
    load_scale,
    load_tile_scales,
)

_TILE = tl.constexpr(TILE)
# In names: `row` = query token within the request * N + head. L latent, R rope, N heads.


@triton.jit
def query_tokens(query_start_ptr, request, query_len, RAGGED: tl.constexpr):
    """First query token of a request, and how many it has."""
    if RAGGED:
        first = tl.load(query_start_ptr + request)
        tokens = tl.load(query_start_ptr + request + 1) - first
    else:
        first = request * query_len
        tokens = query_len
    return first, tokens


@triton.jit
def _load_latent(row_ptr, c, valid, dtype: tl.constexpr, L: tl.constexpr, BLOCK_T: tl.constexpr, PACKED: tl.constexpr):
    """Latent values of cache rows as `dtype`, which no scale of a whole layer has multiplied yet."""
    if PACKED:  # multiplied in float32: scales are any number. Tiles of a row are loaded apart: no tile is moved for it
        tiles: tl.constexpr = L // _TILE
        scale = load_tile_scales(row_ptr, tl.arange(0, tiles)[None, :], valid[:, None], L)
        at = tl.arange(0, tiles)[None, :, None] * _TILE + tl.arange(0, _TILE)[None, None, :]
        x = tl.load(row_ptr[:, :, None] + at, mask=valid[:, None, None], other=0)
        x = tl.reshape((from_cache(x, tl.float32) * scale[:, :, None]).to(dtype), (BLOCK_T, L))
    else:
        x = from_cache(tl.load(row_ptr + c[None, :], mask=valid[:, None], other=0), dtype)
    return x


@triton.jit
def _load_rope(row_ptr, r, mask, dtype: tl.constexpr, L: tl.constexpr, ROPE_AT: tl.constexpr):
    """Rotary values of cache rows, likewise."""
    if ROPE_AT > 0:
        x = load_packed_rope(row_ptr, r[None, :], mask, ROPE_AT).to(dtype)
    else:
        x = from_cache(tl.load(row_ptr + (L + r)[None, :], mask=mask, other=0), dtype)
    return x


@triton.jit
def answer(
    request, seq_len, piece, pieces, slot, rows_of_slot, row_tile, first_token, tokens, announced,
    q, cache, out, part, scale_log2,
    N: tl.constexpr, L: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr, ROPE_AT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of query rows over one piece of their request: the answer if there is one piece, else a partial one.

    slot: of the request's first partial answer; with SPLIT of this one, in slots of `rows_of_slot` rows.
    tokens: query tokens of the request, of which the first `announced` get answers.
    ROPE_AT: bytes before the rotary key of a tile-scaled row; 0 if rows are values.
    SPLIT: tokens of a piece; 0 if pieces are nearly equal parts.
    """
    q_latent_ptr, q_rope_ptr, stride_ql_t, stride_ql_n, stride_qr_t, stride_qr_n = q
    cache_ptr, block_table_ptr, cache_scale_ptr, stride_page, stride_token, stride_table = cache
    out_ptr, lse_ptr, stride_out_t, stride_out_n, stride_lse_t, stride_lse_n = out
    part_ptr, part_lse_ptr = part
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // N, (row % N).to(tl.int64)
    real = token < announced
    sees = seq_len - tokens + token  # position of the query itself: the last key it may see
    c, r, t = tl.arange(0, L), tl.arange(0, R_PAD), tl.arange(0, BLOCK_T)
    q_token = (first_token + token).to(tl.int64)
    q_latent = tl.load(
        q_latent_ptr + (q_token * stride_ql_t + head * stride_ql_n)[:, None] + c[None, :], mask=real[:, None], other=0.0
    )
    if R > 0:
        q_rope = tl.load(
            q_rope_ptr + (q_token * stride_qr_t + head * stride_qr_n)[:, None] + r[None, :],
            mask=real[:, None] & (r[None, :] < R),
            other=0.0,
        )
        q_rope = dot_operand(q_rope, UPCAST)
    q_latent = dot_operand(q_latent, UPCAST)

    tiles = tl.cdiv(seq_len, BLOCK_T)
    if SPLIT > 0:
        first_tile = piece * (SPLIT // BLOCK_T)
        end_tile = tl.minimum(first_tile + SPLIT // BLOCK_T, tiles)
    else:  # pieces of one request differ by at most one tile
        first_tile = (tiles * piece) // pieces
        end_tile = (tiles * (piece + 1)) // pieces

    # The scale of all cached values is one of all scores, and of the output.
    cache_scale = load_scale(cache_scale_ptr)
    scale_log2 *= cache_scale

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, L), tl.float32)
    for tile in range(first_tile, end_tile):
        position = tile * BLOCK_T + t
        valid = position < seq_len
        if PAGE % BLOCK_T == 0:  # one page holds the whole tile
            page = tl.load(block_table_ptr + request.to(tl.int64) * stride_table + tile * BLOCK_T // PAGE)
        else:
            page = tl.load(
                block_table_ptr + request.to(tl.int64) * stride_table + position // PAGE, mask=valid, other=0
            )
        base = cache_ptr + (page.to(tl.int64) * stride_page + (position % PAGE) * stride_token)[:, None]
        k_latent = _load_latent(base, c, valid, q_latent.dtype, L, BLOCK_T, ROPE_AT > 0)
        score = dot(q_latent, tl.trans(k_latent), tl.zeros((BLOCK_M, BLOCK_T), tl.float32))
        if R > 0:
            k_rope = _load_rope(base, r, valid[:, None] & (r[None, :] < R), q_rope.dtype, L, ROPE_AT)
            score = dot(q_rope, tl.trans(k_rope), score)
        score = tl.where(position[None, :] <= sees[:, None], score * scale_log2, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing: exp2(-inf - 0) = 0
        rescale = tl.exp2(top - shift)
        weight = tl.exp2(score - shift[:, None])
        total = total * rescale + tl.sum(weight, 1)
        acc = dot(weight.to(k_latent.dtype), k_latent, acc * rescale[:, None])
        top = new_top

    total = tl.where(total > 0, total, 1.0)  # a row that has seen nothing: 0 / 1, and its top is -inf
    acc = acc * (cache_scale / total)[:, None]
    lse = top + tl.log2(total)
    if pieces == 1:
        at_out = (q_token * stride_out_t + head * stride_out_n)[:, None] + c[None, :]
        tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
        tl.store(lse_ptr + q_token * stride_lse_t + head * stride_lse_n, lse * LN_2, mask=real)
    else:
        if SPLIT > 0:
            at_part = slot.to(tl.int64) * rows_of_slot + row
        else:
            at_part = ((slot + piece).to(tl.int64) * tl.num_programs(0) + row_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_ptr + at_part[:, None] * L + c[None, :], acc, mask=real[:, None])
        tl.store(part_lse_ptr + at_part, lse, mask=real)
