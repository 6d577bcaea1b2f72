"""Buffers that captured CUDA graphs read: each step's numbers are copied into them, at addresses that stay."""

from dataclasses import replace

import torch

from mla_backend.steps import DecodeStep
from mla_backend.tree import TreeStep
from mla_kernels import tensor_bytes


class _StepBuffers:
    """A block table and lengths for up to `requests` requests."""

    def __init__(self, requests: int, pages: int, device: torch.device):
        self.table = torch.zeros((requests, pages), dtype=torch.int32, device=device)
        self._seq_lens = torch.ones(requests, dtype=torch.int32, device=device)
        self.bytes = tensor_bytes((requests, pages + 1), torch.int32)

    def hold(self, step: DecodeStep) -> DecodeStep:
        """The same step in these buffers, where its table may be already. A block table keeps what it held beyond the
        step's; no kernel reads there. Lengths may come in another integer type."""
        requests, pages = step.block_table_BM.shape
        table_BM, seq_lens_B = self.table[:requests], self._seq_lens[:requests]
        if step.block_table_BM.data_ptr() != table_BM.data_ptr():
            table_BM[:, :pages].copy_(step.block_table_BM)
        seq_lens_B.copy_(step.seq_lens_B)
        return replace(step, block_table_BM=table_BM, seq_lens_B=seq_lens_B)


class GraphBuffers:
    """For steps of up to `requests` requests of up to `pages` pages, which may bring trees of `tokens` tokens."""

    def __init__(self, requests: int, tokens: int, pages: int, device: torch.device):
        self._step = _StepBuffers(requests, pages, device)
        self._ancestors = _StepBuffers(requests * tokens, tokens, device)
        self.bytes = self._step.bytes + self._ancestors.bytes

    @property
    def block_table(self) -> torch.Tensor:
        """int32 [requests, pages]: where a step's block table can be written at once."""
        return self._step.table

    def hold(self, step: DecodeStep | TreeStep) -> DecodeStep | TreeStep:
        """The same step in these buffers."""
        if isinstance(step, TreeStep):
            return replace(step, context=self._step.hold(step.context), ancestors=self._ancestors.hold(step.ancestors))
        return self._step.hold(step)
