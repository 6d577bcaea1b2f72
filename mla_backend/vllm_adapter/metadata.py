"""vLLM's batch description, turned into engine-neutral steps once for all layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm import envs
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport

from mla_backend.steps import DecodeStep, PrefillStep, TiledStep, tile_queries, tile_tokens
from mla_backend.vllm_adapter import compat, memory


@dataclass
class MLADecodeMetadata(MLACommonDecodeMetadata):
    step: DecodeStep | TiledStep | None = None


@dataclass
class MLAMetadata(MLACommonMetadata[MLADecodeMetadata]):
    prefill_step: PrefillStep | None = None

    def __post_init__(self):
        """The parent refuses head sizes that vLLM's own backends lack; our kernels were already asked."""


class MLAMetadataBuilder(MLACommonMetadataBuilder[MLAMetadata]):
    """Sends every request of up to `reorder_batch_threshold` query tokens to decode, of whatever length each is.

    With VLLM_BATCH_INVARIANT=1 that is every request: prefill then has the bits of decode, also in chunks and behind
    a cached prefix.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, MLAMetadata)
        self._gather_buffer_SK = compat.gather_buffer(self.chunked_prefill_workspace, vllm_config.model_config.dtype)
        self._most_untiled = self.reorder_batch_threshold
        if envs.VLLM_BATCH_INVARIANT:
            self.reorder_batch_threshold = vllm_config.scheduler_config.max_num_batched_tokens
            self._tile_tokens = tile_tokens(
                vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
            )
        # vLLM makes builders before it captures graphs or serves, and only now is the size of pages final.
        layers = vllm_config.compilation_config.static_forward_context
        for impl in {layers[name].impl.attention: layers[name].impl for name in layer_names}.values():
            impl.get_ready(vllm_config, kv_cache_spec.block_size, self._most_untiled)

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
        if longest > self._most_untiled:
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

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> MLAMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if metadata.prefill is not None:
            metadata.prefill_step = self._prefill_step(metadata.prefill)
        return metadata

    def _prefill_step(self, prefill) -> PrefillStep:
        chunks = compat.context_chunks(prefill)
        return PrefillStep(
            query_start_B1=prefill.query_start_loc,
            max_query_len=prefill.max_query_len,
            block_table_BM=prefill.block_table,
            chunks=chunks,
            gather_buffer_SK=self._gather_buffer_SK if chunks else None,
        )
