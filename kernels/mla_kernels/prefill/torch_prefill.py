"""Ragged prefill attention over expanded heads in plain torch, for CPU tensors.

For each request, and for as many of its queries at a time as the processor's cache holds scores for:
  1. scores in float32, as one batched product over heads;
  2. softmax in place, and its log-sum-exp;
  3. weighted values, written to the output.
What is accumulated in is one more key, whose score is its log-sum-exp.
"""

import torch

# Shape suffixes: T query tokens, S keys, B requests, N heads, P nope, R rope, Q = P + R, V value, M queries of a chunk.

_MOST_SCORES = 1 << 20  # 4 MiB of float32; 16 times as many took 1.5 to 2 times as long


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def _attend(q_NMQ, k_NSQ, v_NSV, scale, first_sees: int | None, running):
    """Softmax attention; query i sees the first `first_sees` + i keys, or all if None. Returns out_NMV, lse_NM.

    running: (out_NMV, lse_NM) over other keys, which these add to, or None.
    """
    score_NMS = torch.bmm(q_NMQ, k_NSQ.mT).mul_(scale)
    if first_sees is not None:
        sees_M1 = first_sees + torch.arange(q_NMQ.shape[1])[:, None]
        score_NMS.masked_fill_(torch.arange(k_NSQ.shape[1]) >= sees_M1, -torch.inf)
    if running is not None:
        score_NMS = torch.cat([score_NMS, running[1][..., None].to(score_NMS.dtype)], -1)
    top_NM1 = score_NMS.amax(-1, keepdim=True)
    weight_NMS = score_NMS.softmax(-1)
    lse_NM1 = top_NM1 - weight_NMS.amax(-1, keepdim=True).log()  # the largest weight is exp(top - lse)
    blind_NM1 = top_NM1 == -torch.inf
    if blind_NM1.any():  # a query that sees nothing: softmax is NaN
        weight_NMS.masked_fill_(blind_NM1, 0.0)
        lse_NM1.masked_fill_(blind_NM1, -torch.inf)
    out_NMV = torch.bmm(weight_NMS[..., : v_NSV.shape[1]], v_NSV)
    if running is not None:
        share_NM1 = weight_NMS[..., -1:]
        out_NMV += torch.where(share_NM1 > 0, running[0].to(out_NMV.dtype) * share_NM1, 0.0)
    return out_NMV, lse_NM1.squeeze(-1)


def _all_see(query_start: list[int], key_start: list[int], tokens: int) -> bool:
    """Whether all so many queries are a request's that has keys."""
    keys = map(int.__sub__, key_start[1:], key_start)
    return query_start[0] == 0 and query_start[-1] == tokens and all(keys)


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
):
    """Same contract as reference.prefill."""
    heads = q_TNQ.shape[1]
    acc = torch.promote_types(q_TNQ.dtype, torch.float32)
    if accumulate and (out_TNV is None or lse_TN is None):
        raise ValueError("accumulate needs out_TNV and lse_TN with what was seen so far; pass both, or leave it out")
    if not accumulate:
        if out_TNV is None:
            out_TNV = q_TNQ.new_empty(*q_TNQ.shape[:2], v_SNV.shape[-1])
        if lse_TN is None:
            lse_TN = q_TNQ.new_empty(q_TNQ.shape[:2], dtype=acc)
    query_start, key_start = query_start_B1.tolist(), key_start_B1.tolist()
    if not accumulate and not _all_see(query_start, key_start, len(q_TNQ)):
        out_TNV.zero_()
        lse_TN.fill_(-torch.inf)
    for b, first_key in enumerate(key_start[:-1]):
        keys = slice(first_key, key_start[b + 1])
        num_keys, end = keys.stop - keys.start, query_start[b + 1]
        if query_start[b] == end or (num_keys == 0 and not accumulate):
            continue
        k_NSQ = torch.cat([k_nope_SNP[keys], k_rope_SNR[keys]], -1).transpose(0, 1).to(acc)
        v_NSV = v_SNV[keys].transpose(0, 1).to(acc)
        chunk = max(1, _MOST_SCORES // (heads * max(num_keys, 1)))
        for first in range(query_start[b], end, chunk):
            mine = slice(first, min(first + chunk, end))
            visible = slice(0, max(1, num_keys - end + mine.stop) if causal else num_keys)
            first_sees = num_keys - end + first + 1 if causal else None
            q_NMQ = q_TNQ[mine].transpose(0, 1).to(acc)
            running = (out_TNV[mine].transpose(0, 1), lse_TN[mine].T) if accumulate else None
            out_NMV, lse_NM = _attend(q_NMQ, k_NSQ[:, visible], v_NSV[:, visible], scale, first_sees, running)
            out_TNV[mine], lse_TN[mine] = out_NMV.transpose(0, 1), lse_NM.T
    return out_TNV, lse_TN
