"""Attention of SGLang's MLA layers: translate the call, hand over to `MLAAttention`."""

from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.memory import CONTEXT_ROWS
from mla_backend.scratch import Scratch
from mla_backend.sglang_adapter import NAME, compat, forward_method, logger
from mla_backend.sglang_adapter.graphs import GraphBuffers
from mla_backend.sglang_adapter.metadata import (
    ExtendMetadata,
    PageTables,
    extend_metadata,
    is_tree,
    visible_in_tree,
)
from mla_backend.sglang_adapter.problem import (
    ANY_KERNEL,
    Facts,
    drafts_trees,
    longer_extends,
    make_problem,
    shares_cache,
)
from mla_backend.steps import DecodeStep, TiledStep, tile_tokens
from mla_backend.tree import TreeAttention, TreeStep, ancestors_of
from mla_backend.warmup import Traffic, warm_up

SHORT_TABLE_PAGE = 16  # tokens a page, from which on a block table of the longest request costs nothing to copy


class SGLangMLABackend(AttentionBackend):
    """What `--attention-backend mla_backend` selects, and `--prefill-` or `--decode-attention-backend` of that name."""

    def __init__(self, runner, *, branches: int = 1):
        """branches: requests of ours that each of SGLang's can be in a batch of decode.

        Raises ValueError with every reason why this model runner cannot use us.
        """
        super().__init__()
        facts = Facts.of_runner(runner)
        self.problem, self.long_problem = make_problem(facts)
        self.token_to_kv_pool, self.req_to_token_pool = runner.token_to_kv_pool, runner.req_to_token_pool
        self.max_context_len = runner.model_config.context_len
        self.data_type = self.kv_cache_dtype = runner.kv_cache_dtype
        self._draft_tokens = facts.draft_tokens
        self._others_scale = self.problem.layout.format.scaled and shares_cache(facts.arguments)
        device, config = facts.device, MLABackendConfig.from_environment()
        # Made once for all layers with one scale, which SGLang tells with a layer's first call.
        self._attention = cache(partial(MLAAttention, self.problem, device, config))
        self._long_attention = cache(
            partial(MLAAttention, self.long_problem, device, ANY_KERNEL, operations=("decode",))
        )
        self._tree_attention = cache(partial(TreeAttention, self.problem, device, config))
        # Without them a block table is as wide as the longest request can be: too much to copy for pages of one token.
        self.needs_cpu_seq_lens = self.problem.layout.page_size < SHORT_TABLE_PAGE
        self.tables = PageTables(self.req_to_token_pool.req_to_token, self.problem.layout.page_size)
        where = self.req_to_token_pool.req_to_token.device
        self._graph, self._scratch, self._reserved = None, Scratch(where), 0
        requests = self.req_to_token_pool.req_to_token.shape[0] * branches
        attention = self._attention(scale=self.problem.geometry.softmax_scale)
        self.reserve(requests)
        said = attention.describe(max_requests=requests)
        if not self.problem.split_tokens:
            long = self._long_attention(scale=attention.scale).chosen["decode"].kernel.name
            said += f"; more than {self.problem.max_query_len} query tokens of a request in latent space: {long}"
        # Before kernels are compiled, which takes a while.
        _say_once(f"{said}; {self._scratch.bytes / 2**20:.1f} MiB of scratch in all")
        if warmed := self._warm_up(requests, facts):
            logger.info("mla_backend: %s", warmed)

    def reserve(self, requests: int) -> None:
        """Scratch for so many requests, the same in every layer and step. What is enough stays where it is."""
        self._reserved = max(requests, self._reserved)
        for attention, its_requests in self._decoders(self._reserved):
            self._scratch.reserve(attention.decode_workspace(its_requests))

    def _decoders(self, requests: int):
        """All that decodes in latent space here, and how many requests of its own a batch of `requests` is to it."""
        scale = self.problem.geometry.softmax_scale
        yield self._attention(scale=scale), requests
        if self.problem.split_tokens:  # longer extends come in tiles, and trees are refused
            return
        yield self._long_attention(scale=scale), requests
        if self._draft_tokens > 1:
            yield from self._tree_attention(scale=scale, tokens=self._draft_tokens).parts(requests)

    def _warm_up(self, requests: int, facts: Facts) -> str:
        """Compile and load what any batch can need, before SGLang captures graphs or serves."""
        where, page_size = self.req_to_token_pool.req_to_token.device, self.problem.layout.page_size
        (short, _), *others = self._decoders(requests)
        most, scratch = self.problem.max_query_len, self._take(short, requests)
        traffic = Traffic(
            max_requests=requests,
            page_size=page_size,
            uniform=sorted({1, self._draft_tokens}),
            joined=forward_method.joins_queries(facts.model_config),
        )
        if self.problem.split_tokens:
            traffic = replace(traffic, tiled=(tile_tokens(facts.heads),))
            return warm_up(short, traffic, where, scratch=scratch, operations=("decode", "cache_write"))
        (long, _), *tree = others
        said = [warm_up(short, replace(traffic, ragged=range(1, most + 1)), where, scratch=scratch)]
        longer = replace(traffic, uniform=(), ragged=longer_extends(facts, most))
        said.append(warm_up(long, longer, where, scratch=self._take(long, requests), operations=("decode",)))
        if drafts_trees(facts.arguments):
            merged = self.problem.geometry.kv_lora_rank
            for (attention, its_requests), tokens in zip(tree, (page_size, 1), strict=True):
                trees = Traffic(max_requests=its_requests, page_size=tokens, merged=merged, joined=traffic.joined)
                said.append(warm_up(attention, trees, where, scratch=self._take(attention, its_requests)))
        return "; ".join(filter(None, said))

    def _take(self, attention: MLAAttention, requests: int) -> list[torch.Tensor]:
        return self._scratch.take(attention.decode_workspace(requests))

    def share_scratch_of(self, other: "SGLangMLABackend") -> None:
        """Take another backend's scratch, which must never run at the same time."""
        self._scratch, self._reserved = other._scratch, other._reserved

    # Metadata: once a step, for all layers.

    def init_forward_metadata(self, forward_batch):
        """Without a graph: new tensors, as small as the batch."""
        mode = forward_batch.forward_mode
        if forward_batch.batch_size == 0:
            self.forward_metadata = None
        elif mode.is_decode_or_idle() or mode.is_target_verify() or mode.is_draft_extend_v2():
            self.forward_metadata = self._uniform_step(forward_batch, padded=False)
        else:
            self.forward_metadata = extend_metadata(
                forward_batch,
                self.tables,
                self.problem,
                most_keys=min(CONTEXT_ROWS, forward_batch.get_max_chunk_capacity()),
            )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        """What captured graphs read: as large as they can ever need, at addresses that stay. Raises ValueError if no
        graph can capture the kernel for decode."""
        decode = self._attention(scale=self.problem.geometry.softmax_scale).chosen["decode"].kernel
        if not decode.capturable:
            raise ValueError(
                f"--attention-backend {NAME} cannot be captured in CUDA graphs with MLA_BACKEND_DECODE={decode.name}, "
                "which plans each batch on the host: set --disable-cuda-graph, or unset MLA_BACKEND_DECODE"
            )
        self._graph = GraphBuffers(
            max_bs, self._draft_tokens, self.tables.most_pages, self.req_to_token_pool.req_to_token.device
        )
        self.reserve(max_bs)
        logger.info(
            "mla_backend: %.1f MiB of block tables for CUDA graphs of %d requests in pages of %d",
            self._graph.bytes / 2**20,
            max_bs,
            self.problem.layout.page_size,
        )

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        """Before a graph is captured or replayed: bring its buffers up to date."""
        if forward_batch.forward_mode.is_extend_without_speculative():
            raise NotImplementedError(
                "mla_backend attends to a prefill between the pieces of a graph, not in one: leave "
                "--cuda-graph-backend-prefill out, or set --disable-prefill-cuda-graph"
            )
        self.hold_for_graph(self._uniform_step(forward_batch, padded=True))

    def hold_for_graph(self, step: DecodeStep | TreeStep) -> None:
        """Make this the step that a graph reads."""
        self.forward_metadata = self._graph.hold(step)

    def update_verify_buffers_to_fill_after_draft(self, spec_info, cuda_graph_bs):
        """SGLang says when a draft is there whose verification was planned before. Chains are planned without it, and
        for trees `make_problem` refuses this order."""

    def get_cuda_graph_seq_len_fill_value(self):
        return 1

    def _uniform_step(self, forward_batch, *, padded: bool) -> DecodeStep | TreeStep:
        """The step of a batch whose requests all bring as many tokens.

        SGLang counts a decoded token among the cached ones already; tokens to verify it does not; and tokens that
        extend a draft only if the batch is padded for a graph, where each request has a whole window of them.
        """
        mode, query_len = forward_batch.forward_mode, self._draft_tokens
        seq_lens_B = forward_batch.seq_lens[: forward_batch.batch_size]  # SGLang hands over whole buffers of graphs
        if mode.is_target_verify():
            if is_tree(forward_batch.spec_info):
                return self._tree_step(forward_batch)
            seq_lens_B = seq_lens_B + query_len
        elif mode.is_draft_extend_v2():
            if not padded and forward_batch.extend_seq_lens is not None:
                seq_lens_B = seq_lens_B - forward_batch.extend_seq_lens + query_len
        else:
            query_len = 1
        # A launch costs the host as much as a short step costs the GPU: for a graph, into its buffers directly.
        into = self._graph.block_table if padded else None
        return DecodeStep(
            block_table_BM=self._table(forward_batch, more=query_len, into=into),
            seq_lens_B=seq_lens_B if padded else seq_lens_B.to(torch.int32),
            query_len=query_len,
        )

    def _tree_step(self, forward_batch) -> TreeStep:
        tokens, context_lens_B = self._draft_tokens, forward_batch.seq_lens[: forward_batch.batch_size]
        visible_BSS = visible_in_tree(forward_batch.spec_info.custom_mask, context_lens_B, tokens)
        # In a batch that is padded for a graph SGLang pads lengths, but not slots; slot 0 is nobody's.
        slots_T = forward_batch.out_cache_loc[: len(visible_BSS) * tokens]
        slots_T = torch.nn.functional.pad(slots_T, (0, len(visible_BSS) * tokens - len(slots_T)))
        table, lens = ancestors_of(visible_BSS, slots_T.view(-1, tokens))
        return TreeStep(
            tokens=tokens,
            context=DecodeStep(
                block_table_BM=self._table(forward_batch), seq_lens_B=context_lens_B.to(torch.int32), query_len=1
            ),
            ancestors=DecodeStep(block_table_BM=table, seq_lens_B=lens, query_len=1),
        )

    def _table(self, forward_batch, more: int = 0, into: torch.Tensor | None = None) -> torch.Tensor:
        """Block tables of a batch with `more` tokens a request than SGLang says."""
        rows_B = forward_batch.req_pool_indices[: forward_batch.batch_size]
        return self.tables.make(rows_B, self.longest(forward_batch) + more, into)

    def longest(self, forward_batch) -> int:
        """Most cached tokens of any request, or that one can have: SGLang does not keep the host's lengths up to date
        (0.5.14 and 0.5.15 hand over old ones) for a backend that says it does without."""
        lens = forward_batch.seq_lens_cpu if self.needs_cpu_seq_lens else None
        if lens is None or not len(lens):
            return self.max_context_len
        return int(lens[: forward_batch.batch_size].max())

    # Layers.

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, **others):
        _refuse(layer, others, others_scale=self._others_scale)
        if save_kv_cache and k is not None:
            self._write(layer, forward_batch, *self._split(k, k_rope))
        return self._attend_latent(q, q_rope, layer, self.forward_metadata)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, **others):
        _refuse(layer, others, others_scale=self._others_scale)
        if not self._is_absorbed(layer):
            return self._attend_expanded(q, k, v, layer, forward_batch)
        if save_kv_cache and k is not None:
            self._write(layer, forward_batch, *self._split(k, k_rope))
        step = self.forward_metadata
        return self._attend_latent(q, q_rope, layer, step.latent if isinstance(step, ExtendMetadata) else step)

    def prepare_prefill_qkv(self, *, q, q_pe, kv_a, k_pe, positions, layer, forward_batch):
        """SGLang's hook before attention over expanded heads: rotate, write the cache, and keep the new latent rows.

        Their up-projection follows in `forward_extend`, which takes keys and values as views of it, so the key and
        value that go through SGLang's layer in between are only shapes.
        """
        if layer.rotary_emb is not None:
            q_pe, k_pe = layer.rotary_emb(positions, q_pe, k_pe)
            q[..., self.problem.geometry.qk_nope_head_dim :] = q_pe
        k_rope_TR = k_pe.reshape(len(kv_a), -1)
        self._write(layer.attn_mha, forward_batch, kv_a, k_rope_TR)
        forward_batch.mla_backend_latent = kv_a, k_rope_TR
        shape = q.new_empty(1).expand(q.shape)
        return q, shape, q.new_empty(1).expand(*q.shape[:2], self.problem.geometry.v_head_dim)

    def _attend_expanded(self, q, k, v, layer, forward_batch):
        geometry, step = self.problem.geometry, self.forward_metadata.expanded
        attention = self._attention(scale=layer.scaling)
        q_TNQ = q.view(-1, geometry.num_heads, geometry.qk_head_dim)
        # Rows that pad a batch belong to no request and nobody writes them.
        out_TNV = q_TNQ.new_zeros((*q_TNQ.shape[:2], geometry.v_head_dim))
        cached = {"up_project": lambda latent_SL: self._up_project(layer, latent_SL), "out_TNV": out_TNV}
        latent = forward_batch.__dict__.pop("mla_backend_latent", None)
        if latent is not None:
            attention.prefill(q_TNQ, *latent, self._cache(layer), step, **cached)
        else:
            k_SNQ = k.view(-1, geometry.num_heads, geometry.qk_head_dim)
            k_nope, k_rope = k_SNQ.split([geometry.qk_nope_head_dim, geometry.qk_rope_head_dim], -1)
            v_SNV = v.view(-1, geometry.num_heads, geometry.v_head_dim)
            attention.prefill_expanded(q_TNQ, k_nope, k_rope, v_SNV, self._cache(layer), step, **cached)
        return out_TNV.flatten(1)

    def _attend_latent(self, q, q_rope, layer, step: DecodeStep | TiledStep | TreeStep):
        """Absorbed attention. With data-parallel attention SGLang pads tokens after requests were planned: rows behind
        those of the step get zeros."""
        q_latent_TNL, q_rope_TNR = self._split(q, q_rope, self.problem.geometry.num_heads)
        rows = len(q_latent_TNL) if step.num_queries is None else step.num_queries
        out_TNL = self._decode(q_latent_TNL[:rows], q_rope_TNR[:rows], layer, step).flatten(1)
        padding = len(q_latent_TNL) - rows
        return torch.nn.functional.pad(out_TNL, (0, 0, 0, padding)) if padding else out_TNL

    def _decode(self, q_latent_TNL, q_rope_TNR, layer, step: DecodeStep | TiledStep | TreeStep):
        tensors = q_latent_TNL, q_rope_TNR, self._cache(layer), step
        if isinstance(step, TreeStep):
            tree = self._tree_attention(scale=layer.scaling, tokens=step.tokens)
            return tree.decode(*tensors, workspaces=[self._take(*part) for part in tree.parts(self._reserved)])[0]
        is_short = isinstance(step, TiledStep) or step.query_len <= self.problem.max_query_len
        attention = (self._attention if is_short else self._long_attention)(scale=layer.scaling)
        return attention.decode(*tensors, workspace=self._take(attention, self._reserved))[0]

    def _is_absorbed(self, layer) -> bool:
        geometry = self.problem.geometry
        widths = layer.tp_k_head_num, layer.head_dim, layer.v_head_dim
        return widths == (1, geometry.latent_dim, geometry.kv_lora_rank)

    def _split(self, x, rope, *heads: int):
        """Latent and rotary parts of absorbed queries, or without heads of new keys, which come apart or as one."""
        geometry = self.problem.geometry
        if rope is not None:
            latent = x.view(-1, *heads, geometry.kv_lora_rank)
            return latent, rope.reshape(len(latent), *heads, geometry.qk_rope_head_dim)
        return x.view(-1, *heads, geometry.latent_dim).split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)

    def _cache(self, layer) -> torch.Tensor:
        """The layer's rows of SGLang's pool [slots, 1, K] as pages.

        In fp8 they are values as they are: so SGLang's pool writes them, whatever scale a checkpoint names.
        """
        layout = self.problem.layout
        rows = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        pages = len(rows) // layout.page_size
        return rows[: pages * layout.page_size].view(layout.shape(pages))

    def _write(self, layer, forward_batch, latent_TL, rope_TR) -> None:
        slots_T = compat.write_slots(forward_batch)
        tokens = min(len(slots_T), len(latent_TL))  # either may be padded for a graph
        attention = self._attention(scale=layer.scaling)
        attention.write(latent_TL[:tokens], rope_TR[:tokens], self._cache(layer), slots_T[:tokens])

    def _up_project(self, layer, latent_SL: torch.Tensor) -> torch.Tensor:
        geometry = self.problem.geometry
        expanded = layer.kv_b_proj(latent_SL.contiguous())[0]
        return expanded.view(-1, geometry.num_heads, geometry.qk_nope_head_dim + geometry.v_head_dim)


@cache
def _say_once(what: str) -> None:
    logger.info("mla_backend %s: %s", version("mla-backend"), what)


def _refuse(layer, others: dict, *, others_scale: bool) -> None:
    """Raise NotImplementedError for what SGLang may ask of a layer and we would otherwise silently leave out.

    others_scale: another backend reads or writes the same fp8 cache, and may divide by a checkpoint's scale; we do not.
    """
    asked = {name: value for name, value in others.items() if value is not None}
    scale = getattr(layer, "k_scale_float", None)
    if others_scale and scale not in (None, 1.0):
        asked[f"an fp8 cache with the scale {scale} that another backend shares"] = scale
    if layer.logit_cap:
        asked["logit_cap"] = layer.logit_cap
    if layer.sliding_window_size > -1:
        asked["sliding_window_size"] = layer.sliding_window_size
    if asked:
        raise NotImplementedError(
            f"mla_backend cannot serve layer {layer.layer_id}: it asks for {', '.join(asked)}, which mla_backend has "
            f"not. Leave out --attention-backend {NAME}."
        )
