"""Softmax attention of query rows over copied cache rows, in plain torch on a CPU: three ways to the same answer.

  * attend_one: products of one request's rows, whole;
  * attend_bfloat16: the same of requests alike, for processors that multiply bfloat16;
  * attend_together: of requests alike by PyTorch's attention, block by block.

All return out_DQL and lse_DQ, where L is `width`.
"""

from typing import NamedTuple

import torch

from mla_kernels import float32
from mla_kernels.bfloat16 import exact_product, rounded_product

# Shape suffixes: D requests, E query tokens of each, Q = E x N query rows of each, L latent, K row, S keys, P pieces of
# each's keys.

PIECE = 128  # keys of a piece, at least, where keys are divided among threads


class Hidden(NamedTuple):
    """Which keys a query token does not see.

    last_D: keys that the last of a request's query tokens may see; each before it sees one less.
    length_D: keys that are there.   tokens: query tokens of each.   keys: with those behind the last.
    """

    last_D: list[int]
    length_D: list[int]
    tokens: int
    keys: int

    @property
    def some(self) -> bool:
        return min(min(self.last_D) - self.tokens + 1, *self.length_D) < self.keys

    @property
    def blind(self) -> bool:
        """Whether a query token sees none."""
        return min(self.last_D) < self.tokens

    def mask_DES(self):
        sees_DE = torch.tensor(self.last_D)[:, None] + torch.arange(1 - self.tokens, 1)
        return torch.arange(self.keys) >= sees_DE.minimum(torch.tensor(self.length_D)[:, None])[..., None]


def attend_one(q_1QK, row_1SK, width: int, scale: float, hidden: Hidden, *, final: bool):
    """Of one request, by products of matrices. Scores of float32 that all overflow to -inf make NaN."""
    (q_QK,), (row_SK,) = q_1QK, row_1SK
    if row_SK.dtype == torch.bfloat16:
        out_QL, lse_Q = attend_bfloat16(q_QK, row_SK, width, scale, hidden, final=final)
    else:
        weight_QS, lse_Q = _weights(float32.product(q_QK, row_SK).mul_(scale), hidden)
        out_QL = float32.product(weight_QS, row_SK.T)[:, :width]
    return out_QL[None], lse_Q[None]


def attend_bfloat16(q_DQK, row_DSK, width: int, scale: float, hidden: Hidden, *, final: bool):
    """Of requests alike, or of one if there is no D. Weights are rounded to bfloat16, nothing else is; the output too,
    once, if it is `final`."""
    weight_DQS, lse_DQ = _weights(exact_product(q_DQK, row_DSK.mT).mul_(scale), hidden)
    multiply = rounded_product if final else exact_product
    return multiply(weight_DQS.to(row_DSK.dtype), row_DSK[..., :width]), lse_DQ


def _weights(score_DQS, hidden: Hidden):
    """Softmax, and the logarithm of its sum; scores are spoiled."""
    if hidden.some:
        _hide(score_DQS, hidden)
    top_DQ1 = score_DQS.amax(-1, keepdim=True)
    weight_DQS = score_DQS.softmax(-1)
    lse_DQ1 = top_DQ1 - weight_DQS.amax(-1, keepdim=True).log_()  # the largest weight is exp(top - lse)
    if hidden.blind:  # softmax is NaN
        blind_DQ1 = top_DQ1 == -torch.inf
        weight_DQS.masked_fill_(blind_DQ1, 0.0)
        lse_DQ1.masked_fill_(blind_DQ1, -torch.inf)
    return weight_DQS, lse_DQ1.squeeze(-1)


def _hide(score_DQS, hidden: Hidden) -> None:
    requests, tokens = len(hidden.last_D), hidden.tokens
    if requests == tokens == 1:  # of a small call's time, a mask would take a part that shows
        score_DQS[..., hidden.length_D[0] :] = -torch.inf
        return
    score_DENS = score_DQS.view(requests, tokens, -1, hidden.keys)
    score_DENS.masked_fill_(hidden.mask_DES()[:, :, None], -torch.inf)


def pieces_of(requests: int, rows: int, keys: int) -> int:
    """Pieces of each request's keys, so that every thread has something to do: PyTorch divides its attention by
    requests and by query rows."""
    idle = torch.get_num_threads() // (requests * -(-rows // 32))
    return max(1, min(idle, keys // PIECE))


def attend_together(q_DQK, row_DSK, width: int, scale: float, hidden: Hidden, *, pieces: int):
    """In so many pieces of the keys.

    Rows are values too, whole: PyTorch's attention wants keys and values of one width, and the rest is dropped.
    Where all scores overflow to -inf, its LSE is not the reference's but finite.
    """
    requests, rows, values = q_DQK.shape
    k_X1SK, q_X1QK = row_DSK[:, None], q_DQK[:, None]
    if pieces > 1:
        k_X1SK = row_DSK.reshape(requests * pieces, 1, -1, values)
        q_X1QK = q_X1QK.expand(-1, pieces, -1, -1).reshape(requests * pieces, 1, rows, values)
    hidden_DPQS = _of_rows(hidden.mask_DES(), pieces, rows) if hidden.some else None
    mask_X1QS = None
    if hidden_DPQS is not None:
        mask_DPQS = torch.zeros(hidden_DPQS.shape, dtype=q_DQK.dtype).masked_fill_(hidden_DPQS, -torch.inf)
        mask_X1QS = mask_DPQS.flatten(0, 1)[:, None]
    out_X1QK, lse_X1Q = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_X1QK, k_X1SK, k_X1SK, attn_mask=mask_X1QS, scale=scale
    )
    out_DPQL = out_X1QK.view(requests, pieces, rows, values)[..., :width]
    lse_DPQ = lse_X1Q.view(requests, pieces, rows)
    if hidden_DPQS is not None:
        blind_DPQ = hidden_DPQS.all(-1)
        out_DPQL = out_DPQL.masked_fill(blind_DPQ[..., None], 0.0)
        lse_DPQ = lse_DPQ.masked_fill(blind_DPQ, -torch.inf)
    return merged(out_DPQL, lse_DPQ)


def _of_rows(hidden_DES, pieces: int, rows: int):
    """[D, P, Q, S of a piece]: the same for every query row and piece of the keys."""
    hidden_DEPS = hidden_DES.unflatten(2, (pieces, -1))
    return hidden_DEPS.transpose(1, 2).repeat_interleave(rows // hidden_DES.shape[1], 2)


def merged(out_DPQL, lse_DPQ):
    """Answers over pieces of the keys as one."""
    if out_DPQL.shape[-3] == 1:
        return out_DPQL.squeeze(-3), lse_DPQ.squeeze(-2)
    lse_DQ = lse_DPQ.logsumexp(-2)
    weight_DPQ = (lse_DPQ - lse_DQ[..., None, :]).exp_().nan_to_num_(0.0)  # -inf - -inf: a query that sees nothing
    return (out_DPQL * weight_DPQ[..., None]).sum(-3), lse_DQ
