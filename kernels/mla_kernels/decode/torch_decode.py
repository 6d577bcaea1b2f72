"""Absorbed decode over the paged latent cache in plain torch, for CPU tensors.

Requests of like length are a batch of matrices, at most _AT_ONCE cached rows of them at a time:
  1. their pages are copied side by side, as float32, those of an fp8 cache times its scale, or those of its tiles;
  2. all query tokens and heads of a request are rows of one product with them, followed by a softmax;
  3. the latent part of the same rows is what the weights sum up.
PyTorch's attention for CPUs does the last two, block by block. Where a processor multiplies bfloat16 itself, nothing is
converted and there are three plain products (_attend_bfloat16).
With `split_tokens` each query token is by itself: a matrix product of other dimensions may have other bits.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mla_kernels.bfloat16 import exact_products, multiplies_bfloat16
from mla_kernels.packed_rows import unpack

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages in the pool, G tokens a
# page, M pages a request, S cached tokens of a request. Of a group: D requests, E query tokens of each, Q = E x N query
# rows of each, P pieces of each's keys.

_AT_ONCE = 9 << 19  # bytes of rows: both products find them in the processor's cache, and the allocator has them ready
_WASTE = 1.25  # rows of a group, each request as long as the longest, over those that are there
_FEW = 1024  # rows of a group below which four products of bfloat16 take longer than PyTorch's attention
_UNIT = 128  # keys of such products are a multiple of so many, at most
_PIECE = 128  # keys of a piece, at least, where keys are divided among threads


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def workspace(problem, device, *, max_requests: int) -> tuple:
    """(shape, dtype) of the scratch tensors that `run` takes: none."""
    return ()


class _Request(NamedTuple):
    """first, tokens: its query tokens.   seq_len: cached tokens."""

    number: int
    first: int
    tokens: int
    seq_len: int


def _groups(requests: Sequence[_Request], page_size: int, most: int) -> Iterator[list[_Request]]:
    """Requests with as many query tokens each and about as many cached ones, the longest last; together at most `most`
    rows, or one request."""
    group: list[_Request] = []
    total = 0
    for one in sorted(requests, key=lambda request: (request.tokens, request.seq_len)):
        rows = (len(group) + 1) * -(-one.seq_len // page_size) * page_size
        alike = group and one.tokens == group[0].tokens and rows <= _WASTE * (total + one.seq_len) + page_size
        if group and not (alike and rows <= most):
            yield group
            group, total = [], 0
        group.append(one)
        total += one.seq_len
    if group:
        yield group


def _values(page_MGK, values: int):
    """Copied pages as values, not scaled."""
    return unpack(page_MGK, values) if page_MGK.dtype == torch.uint8 else page_MGK


def _pages(cache_AGK, page_M):
    """Copies of pages. PyTorch selects bytes, but not fp8."""
    if cache_AGK.itemsize > 1:
        return cache_AGK.index_select(0, page_M)
    return cache_AGK.view(torch.uint8).index_select(0, page_M).view(cache_AGK.dtype)


def _rows(cache_AGK, table_DM, length_D: list[int], first: int, rows: int, values: int, dtype, cache_scale):
    """Cached rows from number `first` on, the first of a page, of requests side by side [D, S, K], in `dtype`.

    length_D: how many each has from there, one or more; behind them are zeros up to `rows`, whatever the cache holds.
    """
    page_size = cache_AGK.shape[1]
    page, pages = first // page_size, -(-rows // page_size)
    last_D = [page + (length - 1) // page_size for length in length_D]
    if min(last_D) == page + pages - 1:
        page_DM = table_DM[:, page : page + pages]
    else:  # what the table holds behind the last is no page
        wanted_DM = torch.arange(page, page + pages).minimum(torch.tensor(last_D)[:, None])
        page_DM = table_DM.gather(1, wanted_DM)
    page_XGK = _values(_pages(cache_AGK, page_DM.reshape(-1)), values)
    row_DSK = page_XGK.reshape(len(length_D), -1, values)[:, :rows].to(dtype)
    if cache_scale is not None:
        row_DSK *= cache_scale
    for d, length in enumerate(length_D):
        if length < rows:
            row_DSK[d, length:] = 0
    return row_DSK


def _hidden(last_D: list[int], length_D: list[int], tokens: int, keys: int):
    """[D, E, S]: which of so many keys a query token does not see; None if they see all.

    last_D: keys that the last of a request's query tokens may see; each before it sees one less.
    length_D: keys that are there.
    """
    if min(min(last_D) - tokens + 1, *length_D) >= keys:
        return None
    sees_DE = torch.tensor(last_D)[:, None] + torch.arange(1 - tokens, 1)
    return torch.arange(keys) >= sees_DE.minimum(torch.tensor(length_D)[:, None])[..., None]


def _unit(keys: int, page_size: int) -> int:
    """What the keys of such products are made a multiple of: PyTorch compiles one of new dimensions first, for half a
    millisecond. An eighth of them at most, but whole pages, so that a batch's matrices lie one behind the other."""
    return max(page_size, 16, min(_UNIT, 1 << (keys // 8).bit_length() - 1)) if keys >= 16 else page_size


def _attend_bfloat16(q_DQK, row_DSK, width: int, scale: float, hidden_DES):
    """As `_attend`, of bfloat16 rows. Weights are rounded to bfloat16, nothing else is."""
    score_DQS = exact_products(q_DQK, row_DSK.mT).mul_(scale)
    if hidden_DES is not None:
        score_DENS = score_DQS.unflatten(1, (hidden_DES.shape[1], -1))
        score_DENS.masked_fill_(hidden_DES[:, :, None], -torch.inf)
    top_DQ1 = score_DQS.amax(-1, keepdim=True)
    weight_DQS = score_DQS.softmax(-1)
    lse_DQ1 = top_DQ1 - weight_DQS.amax(-1, keepdim=True).log_()  # the largest weight is exp(top - lse)
    blind_DQ1 = top_DQ1 == -torch.inf  # sees nothing: softmax is NaN
    weight_DQS.masked_fill_(blind_DQ1, 0.0)
    lse_DQ1.masked_fill_(blind_DQ1, -torch.inf)
    return exact_products(weight_DQS.to(row_DSK.dtype), row_DSK[..., :width]), lse_DQ1.squeeze(-1)


def _pieces(requests: int, rows: int, keys: int) -> int:
    """Pieces of each request's keys, so that every thread has something to do: PyTorch divides its attention by
    requests and by query rows."""
    idle = torch.get_num_threads() // (requests * -(-rows // 32))
    return max(1, min(idle, keys // _PIECE))


def _attend(q_DQK, row_DSK, width: int, scale: float, hidden_DES, *, pieces: int):
    """Softmax attention of every request over its rows, in so many pieces. Returns out_DQL and lse_DQ; L is `width`.

    Rows are values too, whole: PyTorch's attention wants keys and values of one width, and the rest is dropped.
    Where all scores overflow to -inf, its LSE is not the reference's but finite.
    """
    requests, rows, values = q_DQK.shape
    k_X1SK = row_DSK.reshape(requests * pieces, 1, -1, values)
    q_X1QK = q_DQK[:, None].expand(-1, pieces, -1, -1).reshape(requests * pieces, 1, rows, values)
    hidden_DPQS = None if hidden_DES is None else _of_rows(hidden_DES, pieces, rows)
    mask_X1QS = None
    if hidden_DES is not None:
        mask_DPQS = torch.zeros(hidden_DPQS.shape, dtype=q_DQK.dtype).masked_fill_(hidden_DPQS, -torch.inf)
        mask_X1QS = mask_DPQS.flatten(0, 1)[:, None]
    out_X1QK, lse_X1Q = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_X1QK, k_X1SK, k_X1SK, attn_mask=mask_X1QS, scale=scale
    )
    out_DPQL = out_X1QK.view(requests, pieces, rows, values)[..., :width]
    lse_DPQ = lse_X1Q.view(requests, pieces, rows)
    if hidden_DES is not None:
        blind_DPQ = hidden_DPQS.all(-1)
        out_DPQL = out_DPQL.masked_fill(blind_DPQ[..., None], 0.0)
        lse_DPQ = lse_DPQ.masked_fill(blind_DPQ, -torch.inf)
    return _merged(out_DPQL, lse_DPQ)


def _of_rows(hidden_DES, pieces: int, rows: int):
    """[D, P, Q, S of a piece]: the same for every query row and piece of the keys."""
    hidden_DEPS = hidden_DES.unflatten(2, (pieces, -1))
    return hidden_DEPS.transpose(1, 2).repeat_interleave(rows // hidden_DES.shape[1], 2)


def _merged(out_DPQL, lse_DPQ):
    """Answers over pieces of the keys as one."""
    if out_DPQL.shape[1] == 1:
        return out_DPQL[:, 0], lse_DPQ[:, 0]
    lse_DQ = lse_DPQ.logsumexp(1)
    weight_DPQ = (lse_DPQ - lse_DQ[:, None]).exp_().nan_to_num_(0.0)  # -inf - -inf: a query that sees nothing
    return (out_DPQL * weight_DPQ[..., None]).sum(1), lse_DQ


def _at(numbers: list[int]):
    """An index of these in a tensor: a view, where they follow one another."""
    if numbers[-1] - numbers[0] + 1 == len(numbers) and all(map(int.__lt__, numbers, numbers[1:])):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers)


def _answer(group: list[_Request], q_DQK, cache_AGK, table_DM, width: int, scale: float, cache_scale, most: int):
    """out_DQL and lse_DQ of a group, whose rows are copied in the dtype of its queries. A request that is one by itself
    may take several turns, of at most `most` rows."""
    page_size, tokens, (requests, rows, values) = cache_AGK.shape[1], group[0].tokens, q_DQK.shape
    fast = q_DQK.dtype == torch.bfloat16 and requests * group[-1].seq_len >= _FEW
    turn = max(1, most // page_size) * page_size
    parts = []
    for first in range(0, group[-1].seq_len, turn):
        lengths = [min(turn, one.seq_len - first) for one in group]
        pieces = 1 if fast else _pieces(requests, rows, lengths[-1])
        unit = _unit(lengths[-1], page_size) if fast else pieces if requests == 1 else math.lcm(page_size, pieces)
        keys = -(-lengths[-1] // unit) * unit
        row_DSK = _rows(cache_AGK, table_DM, lengths, first, keys, values, q_DQK.dtype, cache_scale)
        attend = _attend_bfloat16 if fast else functools.partial(_attend, pieces=pieces)
        hidden_DES = _hidden([one.seq_len - first for one in group], lengths, tokens, keys)
        parts.append(attend(q_DQK, row_DSK, width, scale, hidden_DES))
    if len(parts) == 1:
        return parts[0]
    return _merged(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))


def _attend_in_splits(q_TNK, row_SK, width: int, scale: float, split_tokens: int):
    """Softmax attention of one request, whose queries are its last tokens. Every product is of one query token and one
    split, zeros behind the last key, so that all calls are alike."""
    tokens, (seq_len, row_elements) = len(q_TNK), row_SK.shape
    padded_SK = row_SK.new_zeros(-(-seq_len // split_tokens) * split_tokens, row_elements)
    padded_SK[:seq_len] = row_SK
    visible = range(seq_len - tokens + 1, seq_len + 1)
    answers = [
        _merge(
            _split_answers(q_NK.clone(), padded_SK, width, scale, split_tokens, keys), q_NK.new_zeros(len(q_NK), width)
        )
        for q_NK, keys in zip(q_TNK, visible, strict=True)
    ]
    out_TNL, lse_TN = zip(*answers, strict=True)
    return torch.stack(out_TNL), torch.stack(lse_TN)


def _split_answers(q_NK, padded_SK, width: int, scale: float, split_tokens: int, visible: int):
    """(out_NL, lse_N) of one query token over each split that has one of its `visible` keys."""
    for first in range(0, visible, split_tokens):
        row_SK = padded_SK[first : first + split_tokens]
        score_NS = torch.matmul(q_NK, row_SK.T).mul_(scale)
        score_NS[:, visible - first :] = -torch.inf
        top_N1 = score_NS.amax(-1, keepdim=True)
        weight_NS = score_NS.sub_(top_N1).exp_()
        total_N1 = weight_NS.sum(-1, keepdim=True)
        yield torch.matmul(weight_NS, row_SK[:, :width]) / total_N1, (top_N1 + total_N1.log()).squeeze(-1)


def _merge(answers, out_NL):
    """Sum up answers over other keys each, in their order. `out_NL` is zeros."""
    answers = list(answers)
    if not answers:
        return out_NL, out_NL.new_full(out_NL.shape[:1], -torch.inf)
    top_N = torch.stack([lse_N for _, lse_N in answers]).amax(0)
    total_N = torch.zeros_like(top_N)
    for part_NL, lse_N in answers:
        weight_N = (lse_N - top_N).exp()
        total_N += weight_N
        out_NL += part_NL * weight_N[:, None]
    return out_NL / total_N[:, None], top_N + total_N.log()


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
    """Same contract as reference.decode."""
    (tokens, heads, width), batch = q_latent_TNL.shape, len(seq_lens_B)
    page_size = cache_AGK.shape[1]
    if query_start_B1 is not None:
        start = query_start_B1.tolist()
    elif tokens == batch * query_len:
        start = range(0, tokens + 1, query_len)
    else:
        raise ValueError(f"{batch} requests of {query_len} query tokens need {batch * query_len} queries, got {tokens}")
    acc = torch.promote_types(q_latent_TNL.dtype, torch.float32)
    if out_TNL is None:
        out_TNL = torch.empty_like(q_latent_TNL)
    if lse_TN is None:
        lse_TN = q_latent_TNL.new_empty(q_latent_TNL.shape[:2], dtype=acc)
    requests = [
        _Request(b, start[b], start[b + 1] - start[b], seq_len)
        for b, seq_len in enumerate(seq_lens_B.tolist())
        if seq_len > 0 and start[b + 1] > start[b]
    ]
    longest = max((one.seq_len for one in requests), default=0)
    if longest > block_table_BM.shape[1] * page_size:
        raise ValueError(
            f"{longest} cached tokens need {-(-longest // page_size)} pages, got {block_table_BM.shape[1]}"
        )
    if sum(one.tokens for one in requests) < tokens:  # some belong to nobody, or see nothing
        out_TNL.zero_()
        lse_TN.fill_(-torch.inf)
    q_TNK = torch.cat([q_latent_TNL, q_rope_TNR], -1)
    if split_tokens is not None:
        for one in requests:
            mine = slice(one.first, one.first + one.tokens)
            q_ENK = q_TNK[mine].to(acc)
            table_1M = block_table_BM[one.number : one.number + 1]
            (row_SK,) = _rows(cache_AGK, table_1M, [one.seq_len], 0, one.seq_len, q_TNK.shape[-1], acc, cache_scale)
            out_TNL[mine], lse_TN[mine] = _attend_in_splits(q_ENK, row_SK, width, scale, split_tokens)
        return out_TNL, lse_TN
    q_TNK = q_TNK if multiplies_bfloat16(q_TNK.dtype, cache_AGK.dtype) else q_TNK.to(acc)
    most = _AT_ONCE // (q_TNK.shape[-1] * q_TNK.itemsize)
    for group in _groups(requests, page_size, most):
        mine = _at([token for one in group for token in range(one.first, one.first + one.tokens)])
        q_DQK = q_TNK[mine].view(len(group), -1, q_TNK.shape[-1])
        table_DM = block_table_BM[_at([one.number for one in group])]
        out_DQL, lse_DQ = _answer(group, q_DQK, cache_AGK, table_DM, width, scale, cache_scale, most)
        out_TNL[mine] = out_DQL.reshape(-1, heads, width).to(out_TNL.dtype)
        lse_TN[mine] = lse_DQ.reshape(-1, heads).to(lse_TN.dtype)
    return out_TNL, lse_TN
