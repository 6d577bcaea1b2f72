"""FlashInfer's ragged prefill for Hopper (its backend "fa3") over heads of 128 + 64 and 128, taken by its
name alone.

It wants keys with both parts in one tensor, so they are concatenated here, and lengths on the host, which waits for the
GPU in each call (flashinfer_calls.py). It knows no answer over other keys: what is accumulated is merged here.
Where FlashInfer's kernels are not installed ready made (package flashinfer-jit-cache), its first plan compiles them
with nvcc, for a minute or more; the warm-up before serving makes one.
"""

from itertools import pairwise

import torch

from mla_kernels.device import Device
from mla_kernels.flashinfer_calls import aligned, clear_blind, ints, is_aligned, kept, on_host, refusals
from mla_kernels.primitives import LN_2, prefill_outputs, require_adjacent

# Shape suffixes: T query tokens, S keys, B requests, N heads, P nope, R rope, Q = P + R, V value.

CAPTURABLE = False

_WORKSPACE_BYTES = 1 << 20  # FlashInfer asks for some; this backend, which cuts no request, uses none
_MERGED = 1024  # tokens that are merged at a time, in float32


def unsupported(problem, device: Device) -> list[str]:
    reasons, geometry = refusals(problem, device), problem.geometry
    nope, rope, v = geometry.qk_nope_head_dim, geometry.qk_rope_head_dim, geometry.v_head_dim
    if (nope, rope, v) != (128, 64, 128):
        reasons.append(f"needs nope 128 + rope 64 and v 128, got {nope} + {rope} and {v}")
    return reasons


def step_bytes(problem, device: Device, *, tokens: int, keys: int) -> int:
    """Bytes that a call takes beside arguments and outputs: whole keys, and an answer to merge with what is there."""
    geometry = problem.geometry
    heads, v = geometry.num_heads, geometry.v_head_dim
    values = keys * heads * geometry.qk_head_dim + tokens * heads * v
    return values * problem.dtype.itemsize + (2 * tokens * heads + 3 * min(tokens, _MERGED) * heads * v) * 4


def _wrapper(device: torch.device):
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")


def _planned(q_TNQ, v_width: int, query_starts, key_starts, scale, causal: bool):
    """A wrapper that is ready to run. Without queries or keys the plan is for one of each, which nobody will run: the
    warm-up before serving has none, and calls to have the kernel compiled and loaded."""
    wrapper = kept("prefill", q_TNQ.device, lambda: _wrapper(q_TNQ.device))
    if not (query_starts[-1] and key_starts[-1]):
        query_starts = key_starts = [0, 1]
    _, heads, width = q_TNQ.shape
    wrapper.plan(
        qo_indptr=ints(query_starts),
        kv_indptr=ints(key_starts),
        num_qo_heads=heads,
        num_kv_heads=heads,
        head_dim_qk=width,
        head_dim_vo=v_width,
        causal=causal,
        sm_scale=scale,
        q_data_type=q_TNQ.dtype,
    )
    return wrapper


def _attend(q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_starts, key_starts, scale, causal, out_TNV):
    """The answer of all requests, in `out_TNV`, and its natural-log LSE."""
    keys, key_lens = key_starts[-1], [last - first for first, last in pairwise(key_starts)]
    wrapper = _planned(q_TNQ, v_SNV.shape[-1], query_starts, key_starts, scale, causal)
    lse_TN = q_TNQ.new_empty(q_TNQ.shape[:2], dtype=torch.float32)
    if keys and len(q_TNQ):
        # Without what lies behind the last key: weights of a block are 0 there, and 0 times NaN is NaN.
        k_SNQ = torch.cat([k_nope_SNP[:keys], k_rope_SNR[:keys]], -1)
        wrapper.run(aligned(q_TNQ), k_SNQ, aligned(v_SNV[:keys]), out=out_TNV, lse=lse_TN, return_lse=True)
        lse_TN *= LN_2.value  # FlashInfer's has base 2
    clear_blind(out_TNV, lse_TN, query_starts, key_lens, causal=causal)
    return lse_TN


def _merge(out_TNV, lse_TN, part_TNV, part_lse_TN) -> None:
    """Fold an answer over other keys into `out_TNV` and `lse_TN`, as reference.merge does. A part that saw nothing has
    no weight, whatever `out_TNV` holds."""
    total_TN = torch.logaddexp(lse_TN, part_lse_TN)
    old_TN1, new_TN1 = ((lse - total_TN).exp_().nan_to_num_(0.0)[..., None] for lse in (lse_TN, part_lse_TN))
    for first in range(0, len(out_TNV), _MERGED):
        rows = slice(first, first + _MERGED)
        merged = torch.where(old_TN1[rows] > 0, out_TNV[rows] * old_TN1[rows], 0.0)
        out_TNV[rows] = merged.addcmul_(part_TNV[rows].float(), new_TN1[rows])
    lse_TN.copy_(total_TN)


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
    """Same contract as reference.prefill, but rows of `out_TNV` that no request owns keep what they held.

    Waits for the GPU, and raises RuntimeError in a CUDA graph.
    """
    out_TNV, lse_TN = prefill_outputs(q_TNQ, v_SNV.shape[-1], out_TNV, lse_TN, accumulate=accumulate)
    require_adjacent(q=q_TNQ, k_nope=k_nope_SNP, k_rope=k_rope_SNR, v=v_SNV, out=out_TNV)
    if len(query_start_B1) < 2:
        return out_TNV, lse_TN
    query_starts, key_starts = on_host("flashinfer_ragged", query_start_B1, key_start_B1)
    owned = slice(query_starts[-1])
    into_TNV, into_lse_TN = out_TNV[owned], lse_TN[owned]
    direct = not accumulate and is_aligned(into_TNV)
    part_TNV = into_TNV if direct else into_TNV.new_empty(into_TNV.shape)
    part_lse_TN = _attend(
        q_TNQ[owned], k_nope_SNP, k_rope_SNR, v_SNV, query_starts, key_starts, scale, causal, part_TNV
    )
    if accumulate:
        _merge(into_TNV, into_lse_TN, part_TNV, part_lse_TN)
        return out_TNV, lse_TN
    into_lse_TN.copy_(part_lse_TN)
    if not direct:
        into_TNV.copy_(part_TNV)
    return out_TNV, lse_TN
