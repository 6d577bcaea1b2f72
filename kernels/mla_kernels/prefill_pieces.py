"""Keys of a prefill in pieces, where its tiles of queries are too few for a GPU: how many, and merging what they gave.

Piece p of the keys leaves its answer to query token t in row p * T + t of scratch: normalised values and their
natural-log LSE, both float32. The kernel below is plain Triton, launched while the one before drains.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mla_kernels.launching import launch
from mla_kernels.primitives import cdiv

# Shape suffixes: T query tokens, B requests, N heads, V value. In the kernel: S pieces at once, R rows of a token and
# head.

# Of a piece at least: about 16 us of an H200. Merging should take 4, and 10 of the host's time; neither was measured.
LEAST_KEYS = 1024
_PIECES, _VALUES = 4, 256  # of each: loaded at once by a warp, which no other need wait for


def pieces_of(tiles: int, keys: int, num_sms: int) -> int:
    """Pieces that keys are cut into, of which the longest request has `keys` at most: as many as there are
    multiprocessors for `tiles` tiles, but not too small. 1 where nothing is cut."""
    return max(1, min(num_sms // tiles, keys // LEAST_KEYS))


def shapes(pieces: int, tokens: int, heads: int, v_width: int):
    """(shape, dtype) of scratch: values, and their LSE."""
    rows = pieces * tokens
    return ((rows, heads, v_width), torch.float32), ((rows, heads), torch.float32)


@triton.jit(
    do_not_specialize=["requests", "tokens", "pieces", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["query_start_ptr", "lse_ptr"],
)
def _merge_pieces_kernel(
    part_ptr, part_lse_ptr, query_start_ptr, requests, tokens, pieces,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    N: tl.constexpr, V: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of a token and head: pieces in their order, after the answer so far if there is one."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token_R, head_R = row_R // N, row_R % N
    s_S, v_V = tl.arange(0, BLOCK_S), tl.arange(0, V)
    if PDL:
        gdc_wait()
    real_R = (token_R >= tl.load(query_start_ptr)) & (token_R < tl.load(query_start_ptr + requests))
    lse_at_R = lse_ptr + token_R * stride_lse_t + head_R * stride_lse_n
    out_at_RV = out_ptr + (token_R * stride_out_t + head_R * stride_out_n)[:, None] + v_V[None, :]

    top_R = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    acc_RV = tl.zeros((BLOCK_R, V), tl.float32)
    if ACCUMULATE:
        top_R = tl.load(lse_at_R, mask=real_R, other=-float("inf"))
        seen_R = top_R > -float("inf")
        total_R = tl.where(seen_R, 1.0, 0.0)
        acc_RV = tl.load(out_at_RV, mask=real_R[:, None], other=0.0).to(tl.float32)
        acc_RV = tl.where(seen_R[:, None], acc_RV, 0.0)  # what a row has that saw nothing may be NaN
    for begin in range(0, pieces, BLOCK_S):
        piece_S = begin + s_S
        here_SR = (piece_S < pieces)[:, None] & real_R[None, :]
        at_SR = piece_S.to(tl.int64)[:, None] * tokens * N + row_R[None, :]
        lse_SR = tl.load(part_lse_ptr + at_SR, mask=here_SR, other=-float("inf"))
        at_SRV = at_SR[:, :, None] * V + v_V[None, None, :]
        value_SRV = tl.load(part_ptr + at_SRV, mask=here_SR[:, :, None], other=0.0)
        new_top_R = tl.maximum(top_R, tl.max(lse_SR, 0))
        shift_R = tl.where(new_top_R == -float("inf"), 0.0, new_top_R)
        rescale_R, weight_SR = tl.exp(top_R - shift_R), tl.exp(lse_SR - shift_R[None, :])
        value_SRV = tl.where((weight_SR > 0)[:, :, None], value_SRV * weight_SR[:, :, None], 0.0)
        total_R = total_R * rescale_R + tl.sum(weight_SR, 0)
        acc_RV = acc_RV * rescale_R[:, None] + tl.sum(value_SRV, 0)
        top_R = new_top_R

    safe_R = tl.where(total_R > 0, total_R, 1.0)
    if ACCUMULATE:
        tl.debug_barrier()  # every thread has loaded what was there before one replaces it
    tl.store(out_at_RV, (acc_RV / safe_R[:, None]).to(out_ptr.dtype.element_ty), mask=real_R[:, None])
    tl.store(lse_at_R, top_R + tl.log(safe_R), mask=real_R)


def merge_pieces(
    out_TNV, lse_TN, part_XNV, part_lse_XN, query_start_B1, *, pieces: int, accumulate: bool, overlap: bool
) -> None:
    """Fill the rows of `out_TNV` and `lse_TN` that a request owns, or fold the pieces into them.

    part_XNV, part_lse_XN: of `shapes`, X = pieces * T.  overlap: launch before the kernel ahead has ended.
    """
    T, N, V = out_TNV.shape
    rows = _VALUES // V
    launch(
        _merge_pieces_kernel, (cdiv(T * N, rows),),
        part_XNV, part_lse_XN, query_start_B1, query_start_B1.shape[0] - 1, T, pieces,
        out_TNV, *out_TNV.stride()[:2], lse_TN, *lse_TN.stride(),
        N=N, V=V, ACCUMULATE=accumulate, BLOCK_S=_PIECES, BLOCK_R=rows, PDL=overlap,
        num_warps=1, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
