"""Absorbed decode over the paged latent cache in plain torch, for CPU tensors.

For each request:
  1. its pages are copied side by side, as float32, those of an fp8 cache times its scale, or those of its tiles;
  2. all its query tokens and heads are rows of one product with them, followed by a softmax;
  3. the latent part of the same rows is what the weights sum up.
With `split_tokens` each query token is by itself: a matrix product of other dimensions may have other bits.
"""

import torch

from mla_kernels.packed_rows import unpack

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages in the pool, G tokens a
# page, M pages a request, S cached tokens of a request.


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def workspace(problem, device, *, max_requests: int) -> tuple:
    """(shape, dtype) of the scratch tensors that `run` takes: none."""
    return ()


def _rows(page_MGK, values: int):
    """Rows of pages one after the other, as values."""
    return (unpack(page_MGK, values) if page_MGK.dtype == torch.uint8 else page_MGK).flatten(0, 1)


def _attend(q_TNK, row_SK, width: int, scale: float):
    """Softmax attention of one request, whose queries are its last tokens. Returns out_TNL and lse_TN; L is `width`."""
    score_TNS = torch.matmul(q_TNK, row_SK.T).mul_(scale)
    tokens, seq_len = len(q_TNK), len(row_SK)
    if tokens > 1:
        last_seen_T11 = (seq_len - tokens + torch.arange(tokens))[:, None, None]
        score_TNS.masked_fill_(torch.arange(seq_len) > last_seen_T11, -torch.inf)
    top_TN1 = score_TNS.amax(-1, keepdim=True)
    top_TN1.masked_fill_(top_TN1 == -torch.inf, 0.0)  # a query that sees nothing: exp(-inf - 0) = 0
    weight_TNS = score_TNS.sub_(top_TN1).exp_()
    total_TN1 = weight_TNS.sum(-1, keepdim=True)
    out_TNL = torch.matmul(weight_TNS, row_SK[:, :width]) / total_TN1.clamp(min=1.0)  # 1 or more unless it sees nothing
    return out_TNL, (top_TN1 + total_TN1.log()).squeeze(-1)


def _attend_in_splits(q_TNK, row_SK, width: int, scale: float, split_tokens: int):
    """As `_attend`; every product is of one query token and one split, zeros behind the last key, so that all calls are
    alike."""
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
    tokens, width, batch = len(q_latent_TNL), q_latent_TNL.shape[-1], len(seq_lens_B)
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
    out_TNL.zero_()
    lse_TN.fill_(-torch.inf)
    for b, seq_len in enumerate(seq_lens_B.tolist()):
        mine = slice(start[b], start[b + 1])
        if seq_len == 0 or mine.start == mine.stop:
            continue
        pages = block_table_BM[b, : -(-seq_len // page_size)].long()
        q_TNK = torch.cat([q_latent_TNL[mine], q_rope_TNR[mine]], -1).to(acc)
        row_SK = _rows(cache_AGK[pages], q_TNK.shape[-1])[:seq_len].to(acc)
        if cache_scale is not None:
            row_SK *= cache_scale
        if split_tokens is None:
            out_TNL[mine], lse_TN[mine] = _attend(q_TNK, row_SK, width, scale)
        else:
            out_TNL[mine], lse_TN[mine] = _attend_in_splits(q_TNK, row_SK, width, scale, split_tokens)
    return out_TNL, lse_TN
