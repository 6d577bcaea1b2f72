"""Absorbed decode over the paged latent cache in plain torch, for CPU tensors.

For each request:
  1. its pages are copied side by side, as float32, those of an fp8 cache times its scale;
  2. all its query tokens and heads are rows of one product with them, followed by a softmax;
  3. the latent part of the same rows is what the weights sum up.
"""

import torch

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages in the pool, G tokens a
# page, M pages a request, S cached tokens of a request.


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def workspace(problem, device, *, max_requests: int) -> tuple:
    """(shape, dtype) of the scratch tensors that `run` takes: none."""
    return ()


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
):
    """Same contract as reference.decode."""
    tokens, width, batch = len(q_latent_TNL), q_latent_TNL.shape[-1], len(seq_lens_B)
    page_size, row_elements = cache_AGK.shape[1:]
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
        row_SK = cache_AGK[pages].view(-1, row_elements)[:seq_len].to(acc)
        if cache_scale is not None:
            row_SK *= cache_scale
        q_TNK = torch.cat([q_latent_TNL[mine], q_rope_TNR[mine]], -1).to(acc)
        out_TNL[mine], lse_TN[mine] = _attend(q_TNK, row_SK, width, scale)
    return out_TNL, lse_TN
