"""Merge attention over two sets of keys in plain torch, for CPU tensors.

1. the merged log-sum-exp;
2. each part's weight is exp(its LSE - merged LSE); values without weight count as 0, even if they are NaN;
3. output and log-sum-exp are replaced by the weighted sum and the merged one.
"""

import torch

# Shape suffixes: T query tokens, N heads, V value.


def unsupported(problem, device) -> list[str]:
    return [] if device.kind == "cpu" else [f"runs on CPU tensors, got {device}"]


def _weighted(value_TNV, lse_TN, merged_TN):
    weight_TN1 = torch.exp(lse_TN - merged_TN)[..., None]  # NaN, which is not > 0, if neither part saw a key
    return torch.where(weight_TN1 > 0, weight_TN1 * value_TNV, 0.0)


def run(out_TNV, lse_TN, part_TNV, part_lse_TN):
    """Same contract as reference.merge."""
    merged_TN = torch.logaddexp(lse_TN, part_lse_TN)
    out_TNV.copy_(_weighted(out_TNV, lse_TN, merged_TN) + _weighted(part_TNV, part_lse_TN, merged_TN))
    lse_TN.copy_(merged_TN)
    return out_TNV, lse_TN
