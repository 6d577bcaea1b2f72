"""All attention work of an MLA layer, for any engine: kernels chosen once, then only called."""

from collections import Counter
from collections.abc import Callable

import torch

from mla_backend.config import MLABackendConfig
from mla_backend.steps import TILES_AT_ONCE, ContextChunk, DecodeStep, PrefillStep, TiledStep
from mla_kernels import Device, Problem, Selection, select, tensor_bytes

LAYER_OPERATIONS = ("decode", "prefill", "cache_write", "cache_gather")

# Kernel launches of this process by (operation, kernel name). A replayed CUDA graph launches without passing here.
CALLS: Counter[tuple[str, str]] = Counter()


class MLAAttention:
    """Decode, prefill and cache traffic of the layers that share one problem on one device.

    Where `cache_scale` is taken, it is a layer's factor of an fp8 cache: one float32 in a tensor on the device, which
    kernels read there, so that nobody waits for it and a captured graph sees a new one. None is 1. Other formats have
    no scale, and it is not read.

    problem: what is static. scale: factor of the scores, with whatever the model multiplies into 1/sqrt(P + R).
    decode_problem: the same of decode where that differs: with context parallelism it gets other ranks' heads, too.
    operations: those that will be called; all that a layer needs without.
    Raises UnsupportedMLA or ValueError (see mla_kernels.select) when an operation has no kernel.
    """

    def __init__(
        self,
        problem: Problem,
        device: Device,
        config: MLABackendConfig,
        *,
        scale: float,
        decode_problem: Problem | None = None,
        operations: tuple[str, ...] = LAYER_OPERATIONS,
    ):
        self.problem, self.device, self.scale = problem, device, scale
        self.decode_problem = decode_problem or problem
        self.chosen: dict[str, Selection] = {
            name: select(name, self._problem_of(name), device, kernel=config.kernel_for(name)) for name in operations
        }
        self._workspaces: dict[int, tuple] = {}
        self._run = {name: chosen.kernel.run for name, chosen in self.chosen.items()}
        self._calls = {name: (name, chosen.kernel.name) for name, chosen in self.chosen.items()}
        self._takes_counter = "prefill" in self.chosen and self.chosen["prefill"].kernel.takes_counter
        geometry = problem.geometry
        self._latent_and_rope = geometry.kv_lora_rank, geometry.qk_rope_head_dim
        self._nope_and_v = geometry.qk_nope_head_dim, geometry.v_head_dim

    def _problem_of(self, operation: str) -> Problem:
        return self.decode_problem if operation == "decode" else self.problem

    def _call(self, operation: str, *args, **kwargs):
        CALLS[self._calls[operation]] += 1
        return self._run[operation](*args, **kwargs)

    def _scaled(self, cache_scale: torch.Tensor | None) -> dict:
        """Options of a kernel that reads or writes the cache: not every kernel of formats without scale knows one."""
        return {"cache_scale": cache_scale} if self.problem.layout.format.scaled else {}

    def describe(self, *, max_requests: int) -> str:
        """One line: which kernels run, why better ones were refused, and what cache and scratch cost."""
        layout = self.problem.layout
        kernels = ", ".join(f"{name.replace('_', ' ')} {one.kernel.name}" for name, one in self.chosen.items())
        refused: dict[str, list[str]] = {}
        for one in self.chosen.values():
            for name, reasons in one.refused.items():
                refused.setdefault(", ".join(reasons), []).append(name)
        why_not = "".join(f"; refused {', '.join(names)}: {reason}" for reason, names in refused.items())
        split, gathered = self.problem.split_tokens, self.decode_problem.geometry.num_heads
        splits = f"; batch invariant, in splits of {split} tokens" if split else ""
        others = f", decode of {gathered} heads over a part of the cache" if self.decode_problem != self.problem else ""
        waiting = [one.kernel.name for one in self.chosen.values() if not one.kernel.capturable]
        waits = f"; calls of {', '.join(waiting)} wait for the GPU and fit no CUDA graph" if waiting else ""
        return (
            f"{kernels}{why_not}{waits}; {self.problem.geometry}{others} on {self.device}; {layout.format.name} cache, "
            f"{layout.row_bytes} bytes a token and layer; "
            f"{self._scratch_bytes(max_requests) / 2**20:.1f} MiB of scratch for decode{splits}"
        )

    def _scratch_bytes(self, max_requests: int) -> int:
        return sum(tensor_bytes(shape, dtype) for shape, dtype in self.decode_workspace(max_requests))

    def decode_workspace(self, max_requests: int):
        """(shape, dtype) of each scratch tensor that `decode` and `extend` take for up to `max_requests` requests, and
        for tiles of any number of them."""
        if max_requests not in self._workspaces:  # asked for in every layer and step
            make = self.chosen["decode"].kernel.load().workspace
            most = max(max_requests, TILES_AT_ONCE)
            self._workspaces[max_requests] = make(self.decode_problem, self.device, max_requests=most)
        return self._workspaces[max_requests]

    def prefill_bytes(self, *, tokens: int, keys: int) -> int:
        """Bytes that a call of the prefill kernel takes at most beside its arguments and outputs."""
        step_bytes = getattr(self.chosen["prefill"].kernel.load(), "step_bytes", None)
        return step_bytes(self.problem, self.device, tokens=tokens, keys=keys) if step_bytes else 0

    def prefill_variants(self, *, own_keys: bool) -> list[dict]:
        """Options of `attend` with which calls take every form that the kernel has; `own_keys` for those of new tokens
        that see each other alone."""
        variants = getattr(self.chosen["prefill"].kernel.load(), "variants", None)
        return variants(self.problem, self.device, own_keys=own_keys) if variants else [{}]

    def decode_variants(self, max_requests: int, query_lens) -> list[tuple[int, int]]:
        """(requests, query tokens) of decode calls that take every form which the kernel has for up to `max_requests`
        requests of any of `query_lens` tokens. Of kernels for GPUs only: others are not compiled."""
        kernel = self.chosen["decode"].kernel.load()
        return kernel.variants(self.decode_problem, self.device, max_requests=max_requests, query_lens=query_lens)

    def write(self, kv_latent_TL, k_rope_TR, cache_AGK, slots_T, *, cache_scale=None) -> None:
        self._call("cache_write", kv_latent_TL, k_rope_TR, cache_AGK, slots_T, **self._scaled(cache_scale))

    def decode(
        self, q_latent_TNL, q_rope_TNR, cache_AGK, step: DecodeStep | TiledStep, *, workspace=None, cache_scale=None
    ):
        """Absorbed attention. Returns out_TNL in the queries' dtype and float32 natural-log lse_TN."""
        if isinstance(step, DecodeStep):
            return self._decode(q_latent_TNL, q_rope_TNR, cache_AGK, step, workspace, cache_scale)
        out_TNL = q_latent_TNL.new_zeros(q_latent_TNL.shape)  # rows that pad a batch belong to no tile
        lse_TN = q_latent_TNL.new_full(q_latent_TNL.shape[:2], -torch.inf, dtype=torch.float32)
        for mine, part in step.parts:
            into = {"out_TNL": out_TNL[mine], "lse_TN": lse_TN[mine]}
            self._decode(q_latent_TNL[mine], q_rope_TNR[mine], cache_AGK, part, workspace, cache_scale, **into)
        return out_TNL, lse_TN

    def extend(
        self,
        q_TNQ: torch.Tensor,
        cache_AGK: torch.Tensor,
        step: TiledStep,
        *,
        w_k_NPL: torch.Tensor,
        w_v_NLV: torch.Tensor,
        out_TNV: torch.Tensor,
        workspace=None,
        cache_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """New tokens, which are cached already, attend in latent space, straight over the paged cache: the answer of
        `prefill` without gathering or expanding what is cached.

        w_k_NPL, w_v_NLV: what turns a latent into a head's key without rotary part, and into its value.
        Writes the rows of `out_TNV` that the tiles of `step` have, and no other; absorbed queries exist for the tiles
        of one part at a time.
        """
        for mine, part in step.parts:
            q, out = _rows(q_TNQ, mine), _rows(out_TNV, mine)
            self._extend_part(q, cache_AGK, part, w_k_NPL, w_v_NLV, out, workspace, cache_scale)
        return out_TNV

    def _extend_part(self, q_TNQ, cache_AGK, step, w_k_NPL, w_v_NLV, out_TNV, workspace, cache_scale) -> None:
        geometry = self.problem.geometry
        q_nope_TNP, q_rope_TNR = q_TNQ.split([geometry.qk_nope_head_dim, geometry.qk_rope_head_dim], -1)
        q_latent_TNL = q_TNQ.new_empty(*q_TNQ.shape[:2], geometry.kv_lora_rank)
        torch.bmm(q_nope_TNP.transpose(0, 1), w_k_NPL, out=q_latent_TNL.transpose(0, 1))
        into = {"out_TNL": torch.empty_like(q_latent_TNL)}  # tiles have all rows: nothing need be filled before
        into["lse_TN"] = q_TNQ.new_empty(q_TNQ.shape[:2], dtype=torch.float32)
        out_TNL, _ = self._decode(q_latent_TNL, q_rope_TNR, cache_AGK, step, workspace, cache_scale, **into)
        torch.bmm(out_TNL.transpose(0, 1), w_v_NLV, out=out_TNV.transpose(0, 1))

    def _decode(self, q_latent_TNL, q_rope_TNR, cache_AGK, step: DecodeStep, workspace, cache_scale, **outputs):
        split = self.problem.split_tokens
        return self._call(
            "decode",
            q_latent_TNL,
            q_rope_TNR,
            cache_AGK,
            step.block_table_BM,
            step.seq_lens_B,
            scale=self.scale,
            query_len=step.query_len,
            query_start_B1=step.query_start_B1,
            workspace=workspace,
            **({"split_tokens": split} if split else {}),
            **self._scaled(cache_scale),
            **outputs,
        )

    def gather(
        self, cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, *, max_key_len: int, cache_scale=None
    ) -> None:
        """Copy cached rows of each request side by side, as in mla_kernels.reference.cache_gather."""
        options = {"max_key_len": max_key_len, **self._scaled(cache_scale)}
        self._call("cache_gather", cache_AGK, block_table_BM, starts_B, key_start_B1, out_SK, **options)

    def merge(self, out_TNV, lse_TN, part_TNV, part_lse_TN) -> None:
        """Fold attention over other keys into `out_TNV` and `lse_TN`."""
        self._call("merge", out_TNV, lse_TN, part_TNV, part_lse_TN)

    def attend(self, q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, key_start_B1, **options):
        """Attention over expanded heads; options as in mla_kernels.reference.prefill, and outputs."""
        return self._call(
            "prefill", q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, key_start_B1, scale=self.scale, **options
        )

    def prefill(
        self,
        q_TNQ: torch.Tensor,
        kv_latent_TL: torch.Tensor,
        k_rope_TR: torch.Tensor,
        cache_AGK: torch.Tensor,
        step: PrefillStep,
        *,
        up_project: Callable[[torch.Tensor], torch.Tensor],
        out_TNV: torch.Tensor,
        cache_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """New tokens attend causally to each other, then to their cached context, chunk by chunk.

        up_project: latent [S, L] to expanded [S, N, P + V]. Keys are never concatenated: nope part and value are views
        of its result, the rotary key is one row for all heads.
        """
        lse_TN = self._attend_new(q_TNQ, *self.expanded(up_project(kv_latent_TL), k_rope_TR), step, out_TNV)
        # Expanded keys of the new tokens are gone: those of a chunk may take their place.
        return self._attend_context(q_TNQ, cache_AGK, step, up_project, out_TNV, lse_TN, cache_scale)

    def prefill_expanded(
        self,
        q_TNQ,
        k_nope_TNP,
        k_rope_TNR,
        v_TNV,
        cache_AGK,
        step: PrefillStep,
        *,
        up_project,
        out_TNV,
        cache_scale=None,
    ) -> torch.Tensor:
        """As `prefill`, for new tokens whose keys and values somebody has expanded."""
        lse_TN = self._attend_new(q_TNQ, k_nope_TNP, k_rope_TNR, v_TNV, step, out_TNV)
        return self._attend_context(q_TNQ, cache_AGK, step, up_project, out_TNV, lse_TN, cache_scale)

    def _attend_new(self, q_TNQ, k_nope_TNP, k_rope_TNR, v_TNV, step: PrefillStep, out_TNV) -> torch.Tensor:
        """Fill `out_TNV` with what new tokens see of each other. Returns lse_TN."""
        lse_TN, starts = step.memory.lse_of(q_TNQ), step.query_start_B1
        options = {
            "max_query_len": step.max_query_len,
            "out_TNV": out_TNV,
            "lse_TN": lse_TN,
            **self._counter(step, q_TNQ),
        }
        self.attend(q_TNQ, k_nope_TNP, k_rope_TNR, v_TNV, starts, starts, causal=True, **options)
        return lse_TN

    def _counter(self, step: PrefillStep, q_TNQ) -> dict:
        """Option of a kernel that wants an integer of 0 and else fills one at each call."""
        return {"counter": step.memory.counter(q_TNQ.device)} if self._takes_counter else {}

    def _attend_context(self, q_TNQ, cache_AGK, step: PrefillStep, up_project, out_TNV, lse_TN, cache_scale):
        """Fold what new tokens see of their cached context into `out_TNV`, and return that."""
        for chunk in step.chunks:
            rows_SK = self._context_rows(cache_AGK, step, chunk, cache_scale)
            latent_SL, rope_SR = rows_SK.split_with_sizes(self._latent_and_rope, -1)
            self.attend(
                _rows(q_TNQ, chunk.tokens),
                *self.expanded(up_project(latent_SL), rope_SR),
                chunk.query_start_B1,
                chunk.key_start_B1,
                max_query_len=chunk.max_query_len,
                causal=False,
                accumulate=True,
                out_TNV=_rows(out_TNV, chunk.tokens),
                lse_TN=_rows(lse_TN, chunk.tokens),
                **self._counter(step, q_TNQ),
            )
        return out_TNV

    def _context_rows(self, cache_AGK, step: PrefillStep, chunk: ContextChunk, cache_scale) -> torch.Tensor:
        """Cached rows of a chunk, request by request, those that other ranks have among them."""
        mine = chunk.share or chunk
        rows_SK = step.gather_buffer_SK[: mine.num_keys]
        self.gather(
            cache_AGK,
            _rows(step.block_table_BM, chunk.requests),
            mine.starts_B,
            mine.key_start_B1,
            rows_SK,
            max_key_len=mine.max_key_len,
            cache_scale=cache_scale,
        )
        return step.all_gather(rows_SK).index_select(0, mine.order_S) if chunk.share else rows_SK

    def expanded(self, kv_SNX, k_rope_SR):
        """Nope part of the keys, their rotary part, the same for all heads, and values: views all."""
        k_nope, v = kv_SNX.split_with_sizes(self._nope_and_v, -1)
        return k_nope, k_rope_SR.unsqueeze(1).expand(-1, self.problem.geometry.num_heads, -1), v


def _rows(x: torch.Tensor, which: slice) -> torch.Tensor:
    """`x[which]`, but `x` where that is all of it: a view takes the host as long as a good part of a launch."""
    return x if which.start == 0 and which.stop == x.shape[0] else x[which]
