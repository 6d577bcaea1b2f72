"""Absorbed decode over the paged latent cache in plain torch, for CPU tensors.

Long requests go one by one, short ones of like length as a batch of matrices, at most _AT_ONCE bytes of rows at a time:
  1. their pages are copied side by side, those of an fp8 cache times its scale, or those of its tiles;
  2. all query tokens and heads of a request are rows of one product with them, followed by a softmax;
  3. the latent part of the same rows is what the weights sum up.
Where a processor multiplies bfloat16 itself, nothing is converted; elsewhere rows become float32. cpu_attention.py has
the last two.
With `split_tokens` each query token is by itself: a matrix product of other dimensions may have other bits.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mla_kernels.bfloat16 import multiplies_bfloat16
from mla_kernels.cpu_attention import (
    Hidden,
    attend_bfloat16,
    attend_one,
    attend_together,
    merged,
    pieces_of,
)
from mla_kernels.packed_rows import unpack

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages in the pool, G tokens a
# page, M pages a request, S cached tokens of a request. Of a group: D requests, E query tokens of each, Q = E x N query
# rows of each.

_AT_ONCE = 9 << 19  # bytes of rows: both products find them in the processor's cache, and the allocator has them ready
_WASTE = 256  # rows that a group may add to make all requests as long as the longest: another call costs more
_ALONE = 6 << 10  # float32 scores of a query token for each thread, from which a request by itself takes less time
_FEW = 256  # rows of a group below which several products take longer than PyTorch's attention
_UNIT = 128  # keys of products are a multiple of so many, at most


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


def _requests(query_start_B1, query_len: int, seq_lens_B, tokens: int) -> list[_Request]:
    """Those that have query tokens, of which there are so many in all, and cached ones."""
    batch = len(seq_lens_B)
    if query_start_B1 is not None:
        start = query_start_B1.tolist()
    elif tokens == batch * query_len:
        start = range(0, tokens + 1, query_len)
    else:
        raise ValueError(f"{batch} requests of {query_len} query tokens need {batch * query_len} queries, got {tokens}")
    return [
        _Request(b, start[b], start[b + 1] - start[b], seq_len)
        for b, seq_len in enumerate(seq_lens_B.tolist())
        if seq_len > 0 and start[b + 1] > start[b]
    ]


def _check_table(block_table_BM, page_size: int, requests: Sequence[_Request]) -> None:
    longest, pages = max((one.seq_len for one in requests), default=0), block_table_BM.shape[1]
    if longest > pages * page_size:
        raise ValueError(f"{longest} cached tokens need {-(-longest // page_size)} pages, got {pages}")


def _groups(requests: Sequence[_Request], page_size: int, most: int, alone: int) -> Iterator[list[_Request]]:
    """Requests with as many query tokens each and about as many cached ones, the longest last; together at most `most`
    rows, or one request. Those of `alone` cached tokens are one each."""
    group: list[_Request] = []
    total = 0
    for one in sorted(requests, key=lambda request: (request.tokens, request.seq_len)):
        rows = (len(group) + 1) * -(-one.seq_len // page_size) * page_size
        alike = group and one.tokens == group[0].tokens and rows <= total + one.seq_len + _WASTE
        if group and not (alike and rows <= most and one.seq_len < alone):
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
    page_DM = table_DM[:, page : page + pages]
    if page_DM.shape[1] < pages:
        wanted_DM = torch.arange(page, page + pages).minimum(torch.tensor(last_D)[:, None])
        page_DM = table_DM.gather(1, wanted_DM)
    elif min(last_D) < page + pages - 1:  # what the table holds behind the last is no page; any will do
        page_DM = page_DM.clamp(0, len(cache_AGK) - 1)
    page_XGK = _values(_pages(cache_AGK, page_DM.reshape(-1)), values)
    row_DSK = page_XGK.reshape(len(length_D), -1, values).to(dtype)
    if pages * page_size > rows:
        row_DSK = row_DSK[:, :rows]
    if cache_scale is not None:
        row_DSK *= cache_scale
    for d, length in enumerate(length_D):
        if length < rows:
            row_DSK[d, length:] = 0
    return row_DSK


def _unit(keys: int, page_size: int) -> int:
    """What the keys of such products are made a multiple of: PyTorch compiles one of new dimensions first, for half a
    millisecond. About an eighth of them, and no less than a page."""
    return max(page_size, 16, min(_UNIT, 1 << (keys // 8).bit_length() - 1)) if keys >= 16 else page_size


def _at(numbers: list[int]):
    """An index of these in a tensor: a view, where they follow one another."""
    if numbers[-1] - numbers[0] + 1 == len(numbers) and all(map(int.__lt__, numbers, numbers[1:])):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers)


def _way(q_DQK, keys: int, page_size: int, *, few: bool, final: bool):
    """A function of cpu_attention.py for requests of so many keys, in the dtype of their queries, and what the keys are
    made a multiple of."""
    if not few and len(q_DQK) == 1:
        return functools.partial(attend_one, final=final), _unit(keys, page_size)
    if not few and q_DQK.dtype == torch.bfloat16:
        return functools.partial(attend_bfloat16, final=final), _unit(keys, page_size)
    pieces = pieces_of(*q_DQK.shape[:2], keys)
    return functools.partial(attend_together, pieces=pieces), pieces if len(q_DQK) == 1 else math.lcm(page_size, pieces)


def _query_tokens(group: list[_Request]):
    """An index of theirs."""
    if len(group) == 1:
        return slice(group[0].first, group[0].first + group[0].tokens)
    return _at([token for one in group for token in range(one.first, one.first + one.tokens)])


def _answer(group: list[_Request], q_DQK, cache_AGK, table_DM, width: int, scale: float, cache_scale, most: int):
    """out_DQL and lse_DQ of a group, whose rows are copied in the dtype of its queries.
    A request that is one by itself may take several turns, of at most `most` rows."""
    page_size, tokens, values = cache_AGK.shape[1], group[0].tokens, q_DQK.shape[-1]
    longest, turn = group[-1].seq_len, max(1, most // page_size) * page_size
    parts = []
    for first in range(0, longest, turn):
        lengths = [min(turn, one.seq_len - first) for one in group]
        attend, unit = _way(q_DQK, lengths[-1], page_size, few=len(group) * longest < _FEW, final=longest <= turn)
        keys = -(-lengths[-1] // unit) * unit
        row_DSK = _rows(cache_AGK, table_DM, lengths, first, keys, values, q_DQK.dtype, cache_scale)
        hidden = Hidden([one.seq_len - first for one in group], lengths, tokens, keys)
        parts.append(attend(q_DQK, row_DSK, width, scale, hidden))
    if len(parts) == 1:
        return parts[0]
    out_DQL, lse_DQ = zip(*parts, strict=True)
    return merged(torch.stack(out_DQL, -3), torch.stack(lse_DQ, -2))


def _answer_in_splits(
    group: list[_Request], q_1QK, cache_AGK, table_1M, width: int, scale: float, cache_scale, most, *, split_tokens: int
):
    """As `_answer`, of one request. Every product is of one query token and one split, zeros behind the last key, so
    that all calls are alike."""
    ((_, _, tokens, seq_len),) = group
    rows = -(-seq_len // split_tokens) * split_tokens
    (row_SK,) = _rows(cache_AGK, table_1M, [seq_len], 0, rows, q_1QK.shape[-1], q_1QK.dtype, cache_scale)
    visible = range(seq_len - tokens + 1, seq_len + 1)
    answers = [
        _merge(_split_answers(q_NK.clone(), row_SK, width, scale, split_tokens, keys), q_NK.new_zeros(len(q_NK), width))
        for q_NK, keys in zip(q_1QK[0].unflatten(0, (tokens, -1)), visible, strict=True)
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
    tokens, heads, width = q_latent_TNL.shape
    requests = _requests(query_start_B1, query_len, seq_lens_B, tokens)
    _check_table(block_table_BM, cache_AGK.shape[1], requests)
    q_TNK = torch.cat([q_latent_TNL, q_rope_TNR], -1)
    acc = torch.promote_types(q_TNK.dtype, torch.float32)
    if split_tokens is not None or not multiplies_bfloat16(q_TNK.dtype, cache_AGK.dtype):
        q_TNK = q_TNK.to(acc)
    most = _AT_ONCE // (q_TNK.shape[-1] * q_TNK.itemsize)
    answer = _answer if split_tokens is None else functools.partial(_answer_in_splits, split_tokens=split_tokens)

    def answer_of(mine, group: list[_Request]):
        """out_TNL and lse_TN of its query tokens, in any dtype."""
        q_DQK = q_TNK[mine].view(len(group), -1, q_TNK.shape[-1])
        table_DM = block_table_BM[_at([one.number for one in group])]
        if len(group) * group[-1].seq_len < _FEW:  # PyTorch's attention of bfloat16 is off by 6e-5 in LSE
            q_DQK = q_DQK.to(acc)
        out_DQL, lse_DQ = answer(group, q_DQK, cache_AGK, table_DM, width, scale, cache_scale, most)
        return out_DQL.reshape(-1, heads, width), lse_DQ.reshape(-1, heads)

    alone = 1 if split_tokens else _ALONE * torch.get_num_threads() // heads if q_TNK.dtype == acc else most
    groups = [(_query_tokens(group), group) for group in _groups(requests, cache_AGK.shape[1], most, alone)]
    if out_TNL is None and lse_TN is None and len(groups) == 1 and slice(0, tokens) == groups[0][0]:
        out_TNL, lse_TN = answer_of(*groups[0])  # of a small call's time, copying these takes a part that shows
        return out_TNL.to(q_latent_TNL.dtype).contiguous(), lse_TN.to(acc)
    out_TNL = torch.empty_like(q_latent_TNL) if out_TNL is None else out_TNL
    lse_TN = q_latent_TNL.new_empty(q_latent_TNL.shape[:2], dtype=acc) if lse_TN is None else lse_TN
    if sum(one.tokens for one in requests) < tokens:  # some belong to nobody, or see nothing
        out_TNL.zero_()
        lse_TN.fill_(-torch.inf)
    for mine, group in groups:
        part_TNL, part_lse_TN = answer_of(mine, group)
        out_TNL[mine], lse_TN[mine] = part_TNL.to(out_TNL.dtype), part_lse_TN.to(lse_TN.dtype)
    return out_TNL, lse_TN
