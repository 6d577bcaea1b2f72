"""FlashInfer's two wrappers as its documentation and its Hopper kernels (0.6.14) have them, for CPU tensors.

What their callers have to see to is made as bad as it can be: LSE has base 2 and lies in one piece, rows that see no
key get what a finite -infinity makes of them, a block of keys reaches into whatever lies behind a request's last key,
and addresses and strides that the kernels misread are refused.
"""

import math
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType

import torch

from mla_kernels import flashinfer_calls

FAR = -5e4  # FlashInfer's -infinity
BLOCK = 128  # keys


def put_in(monkeypatch) -> None:
    """Have `import flashinfer` find this for a test, and nothing left of what was made before."""
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    package.__spec__ = ModuleSpec("flashinfer", None)
    package.BatchPrefillWithRaggedKVCacheWrapper = Prefill
    module.BatchMLAPagedAttentionWrapper = Decode
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    monkeypatch.setattr(flashinfer_calls, "_KEPT", {})
    Decode.made, Decode.planned, Prefill.made, Prefill.planned = 0, [], 0, []


def _check_readable(*tensors) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in x.stride()[:-1])


def _check_plan(*starts) -> None:
    """What is planned with is read on the host, whatever its type: so it must be there, and of the type expected."""
    for numbers in starts:
        assert (numbers.device.type, numbers.dtype) == ("cpu", torch.int32)


def _attend(q_MNK, k_SNK, v_SNV, scale, num_keys: int, causal: bool):
    """Output and LSE of one request. Keys from `num_keys` on lie in the last block, but are not its own."""
    score_NMS = torch.einsum("mnk,snk->nms", q_MNK, k_SNK).nan_to_num()
    last_M1 = num_keys - 1 + torch.arange(1 - len(q_MNK), 1)[:, None] * causal
    hidden_MS = torch.arange(len(k_SNK)) > last_M1.clamp(max=num_keys - 1)
    score_NMS = score_NMS.masked_fill(hidden_MS, FAR) * (scale / math.log(2))
    top_NM1 = score_NMS.amax(-1, keepdim=True)
    weight_NMS = torch.exp2(score_NMS - top_NM1)
    total_NM1 = weight_NMS.sum(-1, keepdim=True)
    out_MNV = torch.einsum("nms,snv->mnv", weight_NMS / total_NM1, v_SNV)
    return out_MNV, (top_NM1 + total_NM1.log2())[..., 0].T


class Decode:
    made, planned = 0, ()

    def __init__(self, workspace, backend):
        assert (backend, workspace.dtype, workspace.numel()) == ("fa3", torch.uint8, 128 << 20)
        Decode.made += 1

    def plan(self, *arguments):
        q_starts, page_starts, pages, lens, heads, latent, rope, _, causal, *_ = self.arguments = arguments
        _check_plan(q_starts, page_starts, lens)
        assert pages.dtype == torch.int32
        assert (latent, rope, causal) == (512, 64, True)
        assert len(q_starts) == len(page_starts) == len(lens) + 1
        Decode.planned.append(q_starts.diff().tolist())
        assert sum(-(-count * heads // 64) for count in Decode.planned[-1]) < 16384

    def run(self, q_latent, q_rope, latent_rows, rope_rows, *, out, return_lse):
        q_starts, page_starts, pages, lens, heads, latent, rope, page_size, causal, scale, *dtypes = self.arguments
        assert return_lse
        assert len(q_latent)
        assert dtypes == [q_latent.dtype, latent_rows.dtype]
        assert q_latent.shape[1:] == (heads, latent)
        assert q_rope.shape[1:] == (heads, rope)
        assert latent_rows.shape[1] == page_size
        out = torch.empty_like(q_latent) if out is None else out
        _check_readable(q_latent, q_rope, latent_rows, rope_rows, out)
        lse = torch.full(q_latent.shape[:2], torch.nan)
        for b, length in enumerate(lens.tolist()):
            mine, used = slice(*q_starts[b : b + 2].tolist()), pages[page_starts[b] : page_starts[b + 1]].long()
            assert len(used) == math.ceil(length / page_size)
            if length == 0 or mine.start == mine.stop:
                out[mine], lse[mine] = torch.nan, torch.nan  # FlashInfer itself says nothing of it
                continue
            row_S1K = torch.cat([latent_rows, rope_rows], -1)[used].flatten(0, 1)[:length, None]
            row_SNK = row_S1K.expand(-1, heads, -1)
            q = torch.cat([q_latent[mine], q_rope[mine]], -1)
            out[mine], lse[mine] = _attend(q, row_SNK, row_SNK[..., :latent], scale, length, causal)
        return out, lse


class Prefill:
    made, planned = 0, ()

    def __init__(self, workspace, layout, *, backend):
        assert (workspace.dtype, layout, backend) == (torch.uint8, "NHD", "fa3")
        Prefill.made += 1

    def plan(self, *, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, **options):
        _check_plan(qo_indptr, kv_indptr)
        assert (head_dim_qk, head_dim_vo) == (192, 128)
        assert len(qo_indptr) == len(kv_indptr)
        assert num_qo_heads == num_kv_heads
        self.heads, self.starts, self.options = num_qo_heads, (qo_indptr, kv_indptr), options
        Prefill.planned.append([x.tolist() for x in self.starts])

    def run(self, q, k, v, *, out, lse, return_lse):
        assert return_lse
        assert self.options["q_data_type"] == q.dtype == k.dtype == v.dtype == out.dtype
        _check_readable(q, k, v, out)
        assert lse.is_contiguous()
        assert lse.dtype == torch.float32
        q_starts, k_starts = (x.tolist() for x in self.starts)
        assert len(q) == q_starts[-1] > 0
        assert len(k) == len(v) > 0
        assert q.shape[1] == self.heads
        for b, (first, last) in enumerate(pairwise(k_starts)):
            mine = slice(*q_starts[b : b + 2])
            if mine.start == mine.stop:
                continue
            if first == last:
                out[mine], lse[mine] = 0.0, -torch.inf
                continue
            block = slice(first, first + -(-(last - first) // BLOCK) * BLOCK)
            options = self.options["sm_scale"], last - first, self.options["causal"]
            out[mine], lse[mine] = _attend(q[mine], k[block], v[block], *options)
        return out, lse
