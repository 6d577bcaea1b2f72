"""Compile and load every kernel that serving can ask for, before there is somebody who waits.

Triton compiles a kernel anew for other constants, types, alignments, and integers that are 1 or multiples of 16. So
each operation is called on next to nothing, laid out as engines lay their tensors out; which batches take other forms
of a decode kernel, its own `variants` says, and that of a prefill kernel how to ask for a form.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mla_backend.attention import CALLS, MLAAttention
from mla_backend.config import OPERATIONS
from mla_backend.steps import TILES_AT_ONCE, DecodeStep


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What an engine can ask for while it serves.

    max_requests: of a decode call.
    uniform: query tokens that all requests of a decode call can have.  ragged: the most that one of them can have
        where they have uneven numbers.  tiled: query tokens of the tiles that longer ones are cut into, if they are.
    page_size: tokens of a page of the cache.  slots: dtype of the slots that are written to.
    accumulates: whether attention to cached context is accumulated in that to new tokens.
    merged: width of outputs that are merged, if they are.
    joined: whether latent and rotary parts of absorbed queries are slices of one tensor.
    """

    max_requests: int
    page_size: int
    uniform: Sequence[int] = (1,)
    ragged: Sequence[int] = ()
    tiled: Sequence[int] = ()
    slots: torch.dtype = torch.int64
    accumulates: bool = True
    merged: int | None = None
    joined: bool = False


def warm_up(
    attention: MLAAttention,
    traffic: Traffic,
    where: torch.device,
    *,
    scratch=None,
    scaled: bool = False,
    operations: tuple[str, ...] = OPERATIONS,
) -> str:
    """Run every form of the kernels of `operations` once. Returns a line for the log; an empty one where nothing is
    compiled: on a CPU, and in Triton's interpreter.

    scratch: what the decode takes, as in `MLAAttention.decode`.
    scaled: whether the engine names a scale of the cache, whose format has one.
    """
    if attention.device.kind == "cpu" or attention.device.interpreted:
        return ""
    began, counted = time.perf_counter(), CALLS.copy()
    with torch.inference_mode():
        wanted = [call for name, call in calls(attention, traffic, where, scratch, scaled) if name in operations]
        for call in wanted:
            call()
    CALLS.clear()
    CALLS.update(counted)  # they count what serves
    return f"{len(wanted)} calls took every form of the kernels, in {time.perf_counter() - began:.1f} s"


def calls(attention: MLAAttention, traffic: Traffic, where: torch.device, scratch, scaled: bool) -> list:
    """(operation, call) for each form that a kernel of `attention` has for this traffic."""
    tensors = _Tensors(attention, traffic, where)
    scale = torch.ones((), device=where) if scaled else None
    scales = (scale, None) if scaled else (None,)  # an engine may leave a scale of 1 out where it writes
    listed = [("cache_write", partial(tensors.write, one)) for one in scales]
    listed += [("cache_gather", partial(tensors.gather, scale)), ("merge", tensors.merge)]
    listed = [(operation, call) for operation, call in listed if operation in attention.chosen]
    if "prefill" in attention.chosen:
        for new in (True, False):
            forms = attention.prefill_variants(own_keys=new)
            listed += [("prefill", partial(tensors.prefill, new, form)) for form in forms]
    if "decode" in attention.chosen:
        most = traffic.max_requests
        batches = (False, most, traffic.uniform), (True, most, traffic.ragged), (True, TILES_AT_ONCE, traffic.tiled)
        for ragged, most_requests, query_lens in batches:
            for requests, query_len in attention.decode_variants(most_requests, query_lens):
                listed.append(("decode", partial(tensors.decode, requests, query_len, ragged, scratch, scale)))
    return listed


class _Tensors:
    """Calls of operations on tensors that hold nothing, in the layouts of engines: rotary parts are slices of wider
    rows, keys and values are views of one tensor, and a step's numbers may begin anywhere."""

    def __init__(self, attention: MLAAttention, traffic: Traffic, where: torch.device):
        self._attention, self._traffic, self._where = attention, traffic, where
        self._dtype, self._geometry = attention.problem.dtype, attention.problem.geometry
        layout = attention.problem.layout
        shape = 2, traffic.page_size, layout.row_elements
        self._cache_AGK = torch.zeros(shape, dtype=layout.format.dtype, device=where)

    def _new(self, *shape, dtype=None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self._dtype, device=self._where)

    def _ints(self, *shape) -> torch.Tensor:
        return self._new(*shape, dtype=torch.int32)

    def _row(self):
        """Latent and rotary part of a token."""
        widths = self._geometry.kv_lora_rank, self._geometry.qk_rope_head_dim
        return self._new(1, self._geometry.latent_dim).split(widths, -1)

    def write(self, scale) -> None:
        slot = self._new(1, dtype=self._traffic.slots) - 1  # nobody's
        self._attention.write(*self._row(), self._cache_AGK, slot, cache_scale=scale)

    def gather(self, scale) -> None:
        rows = self._new(1, self._geometry.latent_dim)
        self._attention.gather(
            self._cache_AGK, self._ints(1, 1), self._ints(1), self._ints(2), rows, max_key_len=1, cache_scale=scale
        )

    def prefill(self, new: bool, form: dict) -> None:
        """New tokens see each other; then a chunk of context is accumulated in their answer. In a form of the kernel,
        as options say."""
        geometry = self._geometry
        q_1NQ = self._new(1, geometry.num_heads, geometry.qk_head_dim)
        kv_1NX = self._new(1, geometry.num_heads, geometry.qk_nope_head_dim + geometry.v_head_dim)
        starts = self._ints(2)
        keys = self._attention.expanded(kv_1NX, self._row()[1])
        into = {"out_TNV": self._new(*q_1NQ.shape[:2], geometry.v_head_dim)}
        into["lse_TN"] = self._new(*q_1NQ.shape[:2], dtype=torch.float32)
        options = {"max_query_len": 1, "causal": new, "accumulate": not new and self._traffic.accumulates, **into}
        options |= form
        self._attention.attend(q_1NQ, *keys, starts, starts, **options)

    def merge(self) -> None:
        out_1NV = self._new(1, self._geometry.num_heads, self._traffic.merged)
        lse_1N = self._new(1, self._geometry.num_heads, dtype=torch.float32)
        self._attention.merge(out_1NV, lse_1N, out_1NV.clone(), lse_1N.clone())

    def decode(self, requests: int, query_len: int, ragged: bool, scratch, scale) -> None:
        tokens = 1 if ragged else requests * query_len  # kernels go by what a request can have at most
        step = DecodeStep(
            block_table_BM=self._ints(requests, 1),
            seq_lens_B=self._ints(requests),
            query_len=query_len,
            query_start_B1=self._ints(requests + 1) if ragged else None,
        )
        self._attention.decode(*self._queries(tokens), self._cache_AGK, step, workspace=scratch, cache_scale=scale)

    def _queries(self, tokens: int):
        """Latent and rotary parts of absorbed queries."""
        geometry = self._attention.decode_problem.geometry
        if self._traffic.joined:
            q_TNK = self._new(tokens, geometry.num_heads, geometry.latent_dim)
            return q_TNK.split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)
        q_TNQ = self._new(tokens, geometry.num_heads, geometry.qk_head_dim)
        latent_TNL = self._new(tokens, geometry.num_heads, geometry.kv_lora_rank)
        return latent_TNL, q_TNQ[..., geometry.qk_nope_head_dim :]
