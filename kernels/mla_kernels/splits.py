"""Fixed splits: every request's cache cut at the same token positions, so that an answer's bits depend on it alone.

A request of n cached tokens has ceil(n / split) splits, or one if it is empty. All requests' splits, one request after
the other, are a line. Whoever computes split i of the line starts afresh, and leaves a partial answer (normalised
outputs and their base-2 LSE, float32) in slot i of the scratch, unless it is its request's only one: that is the
answer. The kernel below adds up the splits that a query row sees, one after another in their order.

Scratch must not grow with batch and context, so a call takes turns: turn t is for the requests whose first split is one
of t * window .. (t + 1) * window - 1, and writes split i to slot i - t * window. Lengths are on the device, so the host
takes as many turns as there can be; in most calls that is one, and a turn that nobody needs is two empty launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mla_kernels.launching import launch
from mla_kernels.primitives import LN_2, scratch

# Query rows of partial answers that a server keeps room for: 256 MiB of them if the latent is 512 wide.
SCRATCH_ROWS = 128 << 10
_CHUNK = 128  # requests, or splits, looked at at once
_AHEAD = 32  # partial answers on their way at once
_FEW_TASKS = 1024  # query rows up to which several programs share one


class Turns(NamedTuple):
    """How a call is divided: `count` turns of requests whose first splits lie in windows of `window`, which have up to
    `most_splits` splits each."""

    count: int
    window: int
    most_splits: int


def _splits_of(seq_len: int, split_tokens: int) -> int:
    return max(1, -(-seq_len // split_tokens))


def reserved_rows(rows: int, requests: int, max_seq_len: int, split_tokens: int) -> int:
    """Query rows of partial answers to keep room for, where each of `requests` requests has up to `rows` query rows.

    Enough for a batch of the longest requests, or what two of them need, or SCRATCH_ROWS.
    """
    most = _splits_of(max_seq_len, split_tokens) + 1  # block tables may be somewhat wider
    return rows * min(requests * most, max(SCRATCH_ROWS // rows, 2 * most))


def turns_of(scratch_rows: int, rows: int, requests: int, max_seq_len: int, split_tokens: int) -> Turns:
    """The turns that a batch takes. Raises ValueError if not even one request's splits fit in the scratch."""
    most = _splits_of(max_seq_len, split_tokens)
    window = requests if most == 1 else scratch_rows // rows - most + 1  # a request's only split needs no scratch
    if window < 1:
        raise ValueError(
            f"a request of up to {max_seq_len} tokens and {rows} query rows leaves {most * rows} rows of partial "
            f"answers in splits of {split_tokens}, got scratch for {scratch_rows}; reserve it for requests as long"
        )
    return Turns((requests - 1) * most // window + 1, window, min(requests * most, window + most - 1))


def shapes(rows: int, latent: int):
    """(shape, dtype) of the scratch for `rows` query rows of partial answers: values, and their LSE."""
    return ((rows * latent,), torch.float32), ((rows,), torch.float32)


def prepare(workspace, rows_and_latent: tuple[int, int], block_table_BM, cache_AGK, *, split_tokens: int):
    """(part, part_lse, turns) of a call whose requests have `rows` query rows each. The block table says how long a
    request can be: the host knows no lengths. Raises ValueError if `workspace` is too small."""
    rows, latent = rows_and_latent
    batch = (len(block_table_BM), block_table_BM.shape[1] * cache_AGK.shape[1], split_tokens)
    if workspace is None:
        workspace = scratch(None, shapes(reserved_rows(rows, *batch), latent), cache_AGK.device)
    part, part_lse = scratch(workspace, shapes(rows, latent), cache_AGK.device)
    return part, part_lse, turns_of(min(len(part) // latent, len(part_lse)), rows, *batch)


@triton.jit(
    do_not_specialize=["query_len", "window", "turn", "stride_lse_t", "stride_lse_n"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "query_start_ptr", "lse_ptr"],
)
def _merge_splits_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, seq_lens_ptr, query_start_ptr, query_len, window, turn,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    N: tl.constexpr, L: tl.constexpr, SPLIT: tl.constexpr, RAGGED: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one query row.

    No sum goes over the threads of a program, each is a chain in the order of the splits, and multiply-adds are asked
    for by name: so tiles may be of any size and change no bit. Nor does a split that the row does not see, whose weight
    is 0. The weight of the only one that it sees is 1: what comes out is that split's answer.
    """
    row, request, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token, tokens = request * query_len, query_len
    if RAGGED:
        first_token = tl.load(query_start_ptr + request)
        tokens = tl.load(query_start_ptr + request + 1) - first_token
    seq_len = tl.load(seq_lens_ptr + request)
    slot = 0
    for first in range(0, request, CHUNK):
        other = first + tl.arange(0, CHUNK)
        lens = tl.load(seq_lens_ptr + other, mask=other < request, other=0)
        slot += tl.sum(tl.where(other < request, tl.maximum(tl.cdiv(lens, SPLIT), 1), 0), 0)
    slot -= turn * window
    if PDL:
        gdc_wait()
    # Tokens that were not announced have no scratch.
    mine = (row < tl.minimum(tokens, query_len) * N) & (seq_len > SPLIT) & (slot >= 0) & (slot < window)
    if not mine:
        return

    sees = seq_len - tokens + row // N  # position of the query itself: the last key it may see
    splits = tl.cdiv(tl.maximum(sees + 1, 0), SPLIT)
    rows_of_slot = (query_len * N).to(tl.int64)
    at_first = slot * rows_of_slot + row
    s, c = tl.arange(0, CHUNK), column * COLUMNS + tl.arange(0, COLUMNS)
    top = -float("inf")
    for begin in range(0, splits, CHUNK):
        here = begin + s < splits
        lse = tl.load(part_lse_ptr + at_first + (begin + s) * rows_of_slot, mask=here, other=-float("inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, splits, AHEAD):
        for i in tl.static_range(AHEAD):
            here = begin + i < splits
            at = at_first + (begin + i) * rows_of_slot
            weight = tl.exp2(tl.load(part_lse_ptr + at, mask=here, other=-float("inf")) - shift)
            value = tl.load(part_ptr + at * L + c, mask=here, other=0.0)
            total += weight
            acc = tl.fma(value, weight, acc)

    total = tl.where(total > 0, total, 1.0)
    token, head = (first_token + row // N).to(tl.int64), (row % N).to(tl.int64)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * stride_out_t + head * stride_out_n + c, out)
    if column == 0:
        tl.store(lse_ptr + token * stride_lse_t + head * stride_lse_n, (top + tl.log2(total)) * LN_2)


def merge_columns(requests: int, rows: int, latent: int) -> int:
    """Columns of a query row that a program merges."""
    return min(latent, 128) if requests * rows <= _FEW_TASKS else latent


def merge_splits(
    out_TNL,
    lse_TN,
    part,
    part_lse,
    seq_lens_B,
    query_start_B1,
    *,
    query_len,
    split_tokens,
    turns,
    turn,
    device,
    overlap,
) -> None:
    """Fill the rows of `out_TNL` and `lse_TN` (natural log) of requests of two splits and more whose turn it is.

    part, part_lse: slots of query_len * N rows each.  query_start_B1: None if all requests have `query_len` tokens.
    overlap: launch before the kernel ahead has ended (sm_90 and newer).
    """
    N, L = out_TNL.shape[1:]
    requests, rows = len(seq_lens_B), query_len * N
    columns = merge_columns(requests, rows, L)
    starts = seq_lens_B if query_start_B1 is None else query_start_B1  # not read where all have as many
    launch(
        _merge_splits_kernel, (rows, requests, L // columns),
        out_TNL, lse_TN, part, part_lse, seq_lens_B, starts, query_len, turns.window, turn,
        out_TNL.stride(0), out_TNL.stride(1), lse_TN.stride(0), lse_TN.stride(1),
        N=N, L=L, SPLIT=split_tokens, RAGGED=query_start_B1 is not None, CHUNK=_CHUNK,
        COLUMNS=columns, AHEAD=1 if device.interpreted else _AHEAD, PDL=overlap,
        num_warps=max(1, columns // 128), **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
