"""The definition of correct, in plain PyTorch: slow, readable, float32 or better inside, on any device.

Every function takes the arguments of the kernels' `run` (less outputs and workspace) and returns what they return.
Feed it float64 tensors to get a float64 answer.

Shape suffixes:
  T query tokens of the batch   B requests        N heads             S key tokens
  L kv_lora_rank                R rope            K row, L + R        P nope    Q = P + R    V value head
  P_ pages in the pool is written A (arena);  G tokens per page;  M pages per request in the block table

Edges, decided here and nowhere else:
  * LSE is the natural logarithm of the sum of exponentials of the scaled scores, float32.
  * A query row that sees no key gives zeros and -inf, so that merging it with anything changes nothing.
  * Query tokens are the last of their sequence: token i of m sees keys 0 .. seq_len - m + i.
  * In an fp8 cache (e4m3) a value x stands for x * cache_scale; no scale is 1. What is written is divided by the scale
    in float32 and rounded to nearest, ties to even; beyond the largest, 448, it becomes 448, and NaN stays NaN.
  * In a tile-scaled cache (uint8, cache_layout.PackedRow) the latent is such values times the scale of their tile of
    128, which writing chooses: the smallest power of two that is max(|largest| / 448, 1e-4) or more, where NaN counts
    as 0 and infinity as the largest float32, so that neither takes the tile's other values along. Rotary values are
    rounded to bfloat16. It has no `cache_scale`.
"""

import torch

from mla_kernels.cache_layout import LEAST_SCALE, TILE, packed_row


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _attend(q_MNK, k_SNK, v_SNV, scale: float, first_position: int | None):
    """Softmax attention of one request: query i sees keys 0 .. first_position + i, or all when None."""
    acc = _accumulator(q_MNK.dtype)
    score_NMS = torch.einsum("mnk,snk->nms", q_MNK.to(acc), k_SNK.to(acc)) * scale
    if first_position is not None:
        query = torch.arange(q_MNK.shape[0], device=q_MNK.device)[:, None]
        key = torch.arange(k_SNK.shape[0], device=q_MNK.device)[None, :]
        score_NMS = score_NMS.masked_fill(key > first_position + query, -torch.inf)
    lse_NM = score_NMS.logsumexp(-1)
    weight_NMS = torch.exp(score_NMS - lse_NM[..., None]).nan_to_num(0.0)  # -inf - -inf: sees nothing
    out_MNV = torch.einsum("nms,snv->mnv", weight_NMS, v_SNV.to(acc))
    return out_MNV.to(q_MNK.dtype), lse_NM.T


def _starts(query_start_B1, query_len: int, batch: int) -> list[int]:
    if query_start_B1 is None:
        return [query_len * b for b in range(batch + 1)]
    return query_start_B1.tolist()


def values_of(cache_AGK, values: int, acc: torch.dtype):
    """What cache rows stand for before any scale of their layer, `values` each, in dtype `acc`."""
    row = packed_row(cache_AGK, values)
    if row is None:
        return cache_AGK.to(acc)
    codes, scales, rope = cache_AGK.split([row.latent, row.rope_at - row.latent, row.bytes - row.rope_at], -1)
    scale = scales.view(torch.float32).to(acc).repeat_interleave(TILE, -1)
    return torch.cat([codes.view(torch.float8_e4m3fn).to(acc) * scale, rope.view(torch.bfloat16).to(acc)], -1)


def _rows_of(cache_AGK, pages_M, first: int, last: int, values: int, acc: torch.dtype, cache_scale):
    """What cache rows first .. last - 1 of a request stand for, [last - first, values], in dtype `acc`."""
    page_size = cache_AGK.shape[1]
    token = torch.arange(first, last, device=cache_AGK.device)
    row_S1K = cache_AGK[pages_M[token // page_size].long(), token % page_size][:, None]
    row_SK = values_of(row_S1K, values, acc)[:, 0]
    return row_SK if cache_scale is None else row_SK * cache_scale


def _stored(x, dtype: torch.dtype, cache_scale):
    """`x` as a cache of `dtype` holds it."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    x = x.float() if cache_scale is None else x.float() / cache_scale
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def _packed(latent_L, rope_R):
    """Bytes of a tile-scaled row."""
    codes, scales = [], []
    for tile in latent_L.float().split(TILE):
        least = tile.abs().nan_to_num(nan=0.0).max() / torch.finfo(torch.float8_e4m3fn).max
        mantissa, exponent = torch.frexp(least.clamp(min=LEAST_SCALE))  # mantissa from 0.5 on, below 1
        scale = torch.ldexp(torch.ones_like(least), exponent - (mantissa == 0.5).int())
        codes.append(_stored(tile, torch.float8_e4m3fn, scale))
        scales.append(scale[None])
    parts = *codes, *scales, rope_R.to(torch.bfloat16)
    return torch.cat([part.view(torch.uint8) for part in parts])


def decode(
    q_latent_TNL,
    q_rope_TNR,
    cache_AGK,
    block_table_BM,
    seq_lens_B,
    *,
    scale,
    query_len=1,
    query_start_B1=None,
    cache_scale=None,
    split_tokens=None,
):
    """Absorbed attention over the paged latent cache (DeepSeek-V2, arXiv 2405.04434, eq. 9-19 and appendix C).

    q_latent_TNL, q_rope_TNR: query, its nope part already multiplied by the key up-projection.
    block_table_BM: page numbers, int32; entries past a sequence's end may hold anything.
    seq_lens_B: cached tokens of each request, its query tokens included.
    query_len: query tokens of every request, or the most of any when `query_start_B1` says where each begins.
    cache_scale: of an fp8 cache, one float32 in a tensor on its device, or None.
    split_tokens: where kernels cut the sum over keys, at multiples of so many tokens, each piece summed up from a fresh
        start and the pieces in their order. It changes no value beyond rounding (here none), and promises bits: those
        of a query row depend on that query, the keys it sees and the arguments that are no tensors, less `query_len`;
        not on other requests, nor on the request's other query tokens, later keys, pages or place in the batch.
    Returns out_TNL in the query's dtype and lse_TN. Rows that no request owns are zeros and -inf.
    """
    width = q_latent_TNL.shape[-1]
    out_TNL = torch.zeros_like(q_latent_TNL)
    acc = _accumulator(q_latent_TNL.dtype)
    lse_TN = q_latent_TNL.new_full(q_latent_TNL.shape[:2], -torch.inf, dtype=acc)
    start = _starts(query_start_B1, query_len, len(seq_lens_B))
    for b, seq_len in enumerate(seq_lens_B.tolist()):
        mine = slice(start[b], start[b + 1])
        tokens = mine.stop - mine.start
        if seq_len == 0 or tokens == 0:
            continue
        q_MNK = torch.cat([q_latent_TNL[mine], q_rope_TNR[mine]], -1)
        row_SNK = _rows_of(cache_AGK, block_table_BM[b], 0, seq_len, q_MNK.shape[-1], acc, cache_scale)[:, None]
        row_SNK = row_SNK.expand(-1, q_MNK.shape[1], -1)
        out_TNL[mine], lse_TN[mine] = _attend(q_MNK, row_SNK, row_SNK[..., :width], scale, seq_len - tokens)
    return out_TNL, lse_TN


def prefill(
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
    """Attention over expanded heads, ragged: request b has queries and keys from start[b] to start[b + 1].

    k_rope_SNR: the rotary key, one for all heads; pass an expanded view (stride 0 over heads).
    causal: queries are the last tokens of their keys; otherwise every query sees every key of its request.
    accumulate: `out_TNV` and `lse_TN` hold attention over other keys (and are read here then alone); the answer is
        folded into them as `merge` would, without its rounding to their dtype before.
    Returns out_TNV in the query's dtype and lse_TN.
    """
    if accumulate:
        part = prefill(
            *(q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, key_start_B1),
            max_query_len=max_query_len,
            scale=scale,
            causal=causal,
        )
        return merge(out_TNV, lse_TN, *part)
    out_TNV = q_TNQ.new_zeros(*q_TNQ.shape[:2], v_SNV.shape[-1])
    lse_TN = q_TNQ.new_full(q_TNQ.shape[:2], -torch.inf, dtype=_accumulator(q_TNQ.dtype))
    query_start, key_start = query_start_B1.tolist(), key_start_B1.tolist()
    for b in range(len(query_start) - 1):
        mine, keys = slice(*query_start[b : b + 2]), slice(*key_start[b : b + 2])
        tokens, num_keys = mine.stop - mine.start, keys.stop - keys.start
        if tokens == 0 or num_keys == 0:
            continue
        k_SNQ = torch.cat([k_nope_SNP[keys], k_rope_SNR[keys]], -1)
        first = num_keys - tokens if causal else None
        out_TNV[mine], lse_TN[mine] = _attend(q_TNQ[mine], k_SNQ, v_SNV[keys], scale, first)
    return out_TNV, lse_TN


def cache_write(kv_latent_TL, k_rope_TR, cache_AGK, slots_T, *, cache_scale=None):
    """Write token t's row `[latent | rope]` at slot page * page_size + offset. Slots outside the pool (-1) are
    skipped.

    cache_scale: of an fp8 cache, one float32 in a tensor on its device, or None.
    """
    pages, page_size, _ = cache_AGK.shape
    width = kv_latent_TL.shape[-1]
    for t, slot in enumerate(slots_T.tolist()):
        if 0 <= slot < pages * page_size:
            row = cache_AGK[slot // page_size, slot % page_size]
            if row.dtype == torch.uint8:
                row[:] = _packed(kv_latent_TL[t], k_rope_TR[t])
                continue
            row[:width] = _stored(kv_latent_TL[t], row.dtype, cache_scale)
            row[width:] = _stored(k_rope_TR[t], row.dtype, cache_scale)


def cache_gather(cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, *, max_key_len, cache_scale=None):
    """Copy cached rows of each request side by side, converted to the dtype of `out_SK`.

    Request b's rows starts[b] .. go to out_SK[key_start[b] : key_start[b + 1]]; other rows of out_SK stay as they are.
    cache_scale: of an fp8 cache, one float32 in a tensor on its device, or None.
    """
    acc = _accumulator(out_SK.dtype)
    key_start = key_start_B1.tolist()
    for b, first in enumerate(starts_B.tolist()):
        count = key_start[b + 1] - key_start[b]
        rows = _rows_of(cache_AGK, block_table_BM[b], first, first + count, out_SK.shape[1], acc, cache_scale)
        out_SK[key_start[b] : key_start[b + 1]] = rows.to(out_SK.dtype)
    return out_SK


def merge(out_TNV, lse_TN, part_TNV, part_lse_TN):
    """Fold attention over other keys into `out_TNV`, `lse_TN`, in place, as if softmax had seen both sets of keys.

    Weights are exp(lse_i - log(sum exp(lse))); a part with lse -inf has no weight, whatever its values are.
    """
    acc = _accumulator(out_TNV.dtype)
    both = torch.stack([lse_TN.to(acc), part_lse_TN.to(acc)])
    total = both.logsumexp(0)
    weight = torch.exp(both - total).nan_to_num(0.0)
    values = torch.stack([out_TNV, part_TNV]).to(acc)
    values = torch.where(weight[..., None] > 0, values, 0.0)
    out_TNV.copy_((weight[..., None] * values).sum(0))
    lse_TN.copy_(total)
    return out_TNV, lse_TN
