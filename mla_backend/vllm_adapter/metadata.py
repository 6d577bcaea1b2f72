"""vLLM's batch description, turned into engine-neutral steps once for all layers."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from vllm import envs
from vllm.distributed.parallel_state import get_dcp_group
from vllm.model_executor.layers.attention.mla_attention import (
    MLAAttention,
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport

from mla_backend.shards import Shards, tokens_as_requests
from mla_backend.steps import (
    DecodeStep,
    PrefillStep,
    Sharing,
    TiledStep,
    plan_prefill,
    tile_queries,
    tile_tokens,
)
from mla_backend.vllm_adapter import compat, memory
from mla_backend.vllm_adapter.backend import is_captured


@dataclass
class MLADecodeMetadata(MLACommonDecodeMetadata):
    step: DecodeStep | TiledStep | None = None


@dataclass
class MLAMetadata(MLACommonMetadata[MLADecodeMetadata]):
    """prefill_step, latent_step: the two ways through a batch's prefill requests, as `plan_prefill` gives them."""

    prefill_step: PrefillStep | None = None
    latent_step: TiledStep | None = None

    def __post_init__(self):
        """The parent refuses head sizes that vLLM's own backends lack; our kernels were already asked."""


class MLAMetadataBuilder(MLACommonMetadataBuilder[MLAMetadata]):
    """Sends every request of up to `reorder_batch_threshold` query tokens to decode, of whatever length each is.

    With VLLM_BATCH_INVARIANT=1 that is every request: prefill then has the bits of decode, also in chunks and behind
    a cached prefix.

    With decode context parallelism the lengths that vLLM hands over are this rank's, and of requests with several query
    tokens they say too little: see `_token_step`.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    _shards: Shards | None = None  # who has which rows, where ranks share the cache

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, MLAMetadata, supports_dcp_with_varlen=True)
        self._gather_buffer_SK = compat.gather_buffer(self.chunked_prefill_workspace, vllm_config.model_config.dtype)
        self._most_untiled = self.reorder_batch_threshold
        self._shards = _shards_of(vllm_config.parallel_config)
        # vLLM 0.29 counts tokens that pad a piecewise graph, too.
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._most_tokens = max(vllm_config.scheduler_config.max_num_seqs * self._most_untiled, captured)
        self._token_buffers = cache(self._make_token_buffers)
        if envs.VLLM_BATCH_INVARIANT:
            self.reorder_batch_threshold = vllm_config.scheduler_config.max_num_batched_tokens
            self._tile_tokens = tile_tokens(
                vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
            )
        # vLLM makes builders before it captures graphs or serves, and only now is the size of pages final.
        layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        models_layers = not isinstance(layers[0], MLAAttention)  # Kimi-Linear's, since 0.27
        for layer in layers:
            compat.refuse_adapters_of(layer.kv_b_proj)
            layer.impl.get_ready(
                layer, vllm_config, kv_cache_spec.block_size, self._most_untiled, models_layer=models_layers
            )
        self._impl = layers[0].impl  # all of them are alike
        self._plans_prefill = self._impl.own_prefill and not models_layers

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """vLLM captures no full graphs where one kernel cannot be captured: it says so and leaves attention between the
        pieces of graphs, or out of them; with --enforce-eager or a cudagraph_mode that has no full graphs it need not.
        """
        return cls._cudagraph_support if is_captured(vllm_config) else AttentionCGSupport.NEVER

    @staticmethod
    def determine_chunked_prefill_workspace_size(vllm_config) -> int:
        """Rows of the buffer that cached context is gathered into."""
        return memory.context_rows(vllm_config)

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        *,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        dcp_tot_seq_lens_device: torch.Tensor | None,
        max_seq_len: int,
        **_,
    ) -> MLADecodeMetadata:
        query_lens = query_start_loc_cpu.diff()
        longest = int(query_lens.max())
        # False also where vLLM counts padding tokens that no request owns (drafts of 0.28 and 0.29 in piecewise
        # graphs).
        uniform = longest * len(query_lens) == num_decode_tokens
        if self._shards:
            # vLLM's V1 runner counts drafts as accepted in its ranks' lengths, but not in those of all ranks.
            seq_lens_device.copy_(self._shards.rows(dcp_tot_seq_lens_device))
        if self._shards and not (uniform and longest <= 1):
            step = self._token_step(
                block_table_tensor, dcp_tot_seq_lens_device, query_start_loc_device, num_decode_tokens
            )
        elif longest > self._most_untiled:
            pages = -(-max_seq_len // self.kv_cache_spec.block_size)  # others are nobody's, and would cost turns
            step = tile_queries(
                query_lens.tolist(), block_table_tensor[:, :pages], seq_lens_device, tokens_of_tile=self._tile_tokens
            )
        else:
            step = DecodeStep(
                block_table_BM=block_table_tensor,
                seq_lens_B=seq_lens_device,
                # Ragged lengths take the largest that there can be: one compiled kernel, not one for each longest
                # length.
                query_len=longest if uniform else max(longest, self._most_untiled),
                query_start_B1=None if uniform else query_start_loc_device,
            )
        return MLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            step=step,
        )

    def _token_step(self, block_table_BM, all_seq_lens_B, query_start_B1, num_tokens: int) -> DecodeStep:
        """Every query token as a request, with as many of this rank's rows as it sees.

        Addresses stay, since a captured graph reads them again.
        """
        request_T, visible_T = tokens_as_requests(all_seq_lens_B, query_start_B1, num_tokens)
        table_XM, rows_X = self._token_buffers(block_table_BM.shape[1])
        torch.index_select(block_table_BM, 0, request_T, out=table_XM[:num_tokens])
        rows_X[:num_tokens] = self._shards.rows(visible_T)
        return DecodeStep(block_table_BM=table_XM[:num_tokens], seq_lens_B=rows_X[:num_tokens], query_len=1)

    def _make_token_buffers(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table and lengths of the most query tokens that one decode has."""

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        return ints(self._most_tokens, pages), ints(self._most_tokens)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> MLAMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if metadata.prefill is not None and self._plans_prefill:
            metadata.prefill_step, metadata.latent_step = self._plan_prefill(metadata, common_attn_metadata)
        return metadata

    def _plan_prefill(self, metadata: MLAMetadata, batch) -> tuple[PrefillStep | None, TiledStep | None]:
        """Our own plan: vLLM's chunks of context are for all prefill requests."""
        first = metadata.num_decodes  # requests before that one are decoded
        query_lens = batch.query_start_loc_cpu[first : metadata.num_reqs + 1].diff().tolist()
        ends = batch.seq_lens_cpu_upper_bound[first : metadata.num_reqs].tolist()  # exact for prefill
        pages = -(-max(ends) // self.kv_cache_spec.block_size)
        return plan_prefill(
            self._impl.attention.problem.geometry,
            query_lens,
            [end - new for end, new in zip(ends, query_lens, strict=True)],
            query_start_B1=metadata.prefill.query_start_loc,
            block_table_BM=metadata.prefill.block_table[:, :pages],
            seq_lens_B=batch.seq_lens[first : metadata.num_reqs],
            gather_buffer_SK=self._gather_buffer_SK,
            absorbs=self._impl.absorbs,
            sharing=self._sharing(),
        )

    def _sharing(self) -> Sharing | None:
        if self._shards is None:
            return None
        gather = partial(get_dcp_group().all_gather, dim=0)
        return Sharing(self._shards, self.chunked_prefill_workspace_size, gather)


def _shards_of(parallel_config) -> Shards | None:
    if parallel_config.decode_context_parallel_size == 1:
        return None
    return Shards(
        ranks=parallel_config.decode_context_parallel_size,
        rank=get_dcp_group().rank_in_group,
        interleave=parallel_config.cp_kv_cache_interleave_size,
    )
