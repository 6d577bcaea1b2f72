"""Our backend under a draft model: in the steps that draft token after token, and in the one that extends the draft."""

import functools

import torch
from sglang.srt.speculative.draft_utils import DraftBackendFactory

from mla_backend.sglang_adapter import NAME, compat
from mla_backend.sglang_adapter.backend import SGLangMLABackend
from mla_backend.steps import DecodeStep


def take_over() -> None:
    """Let SGLang's factory of draft backends make ours; its two lists of names are fixed, and have no place to add to.

    Both lists pass through one method, which we wrap.
    """
    original = DraftBackendFactory._create_backend
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def create(factory, backend_name, backend_map, error_template, **options):
        make = MLAMultiStepDraft if compat.is_list_of_draft_steps(error_template) else _extend
        ours = functools.partial(_made, original, make, factory)
        return original(factory, backend_name, {**backend_map, NAME: ours}, error_template, **options)

    DraftBackendFactory._create_backend = create


def _made(original, make, factory):
    return compat.draft_backend(original, make(factory.draft_model_runner, factory.topk, factory.speculative_num_steps))


def _extend(runner, topk: int, steps: int) -> SGLangMLABackend:
    return SGLangMLABackend(runner)


class MLAMultiStepDraft:
    """One backend for each step that drafts a token from the one before; the last token needs none.

    In step i a request sees its cached context and i + 1 drafted tokens. Each of `topk` branches is a request of its
    own; SGLang puts their tokens behind the context in its table of slots, one branch after another.
    """

    def __init__(self, runner, topk: int, steps: int):
        self.topk, self._steps = topk, steps
        self.attn_backends = [SGLangMLABackend(runner, branches=topk) for _ in range(steps - 1)]
        self.needs_cpu_seq_lens = self.attn_backends[0].needs_cpu_seq_lens
        self._share_scratch()

    def _share_scratch(self) -> None:
        for backend in self.attn_backends[1:]:
            backend.share_scratch_of(self.attn_backends[0])

    def init_forward_metadata(self, forward_batch):
        for backend, step in zip(self.attn_backends, self._decode_steps(forward_batch), strict=True):
            backend.forward_metadata = step

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs * self.topk, max_num_tokens)
        self._share_scratch()

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        for backend, step in zip(self.attn_backends, self._decode_steps(forward_batch), strict=True):
            backend.hold_for_graph(step)

    def init_forward_metadata_in_graph(self, forward_batch):
        """Nothing is left to do in a graph."""

    def _decode_steps(self, forward_batch) -> list[DecodeStep]:
        """The steps' numbers; they share one block table."""
        first = self.attn_backends[0]
        requests = slice(forward_batch.batch_size)
        context_lens_B = forward_batch.seq_lens[requests].to(torch.int32)
        longest = first.longest(forward_batch) + self._steps
        rows_B = forward_batch.req_pool_indices[requests]
        if self.topk == 1:
            table_BM = first.tables.make(rows_B, longest)
        else:
            table_BM = first.tables.make_branches(
                rows_B, context_lens_B, longest, branches=self.topk, tokens=self._steps
            )
            context_lens_B = context_lens_B.repeat_interleave(self.topk)
        return [
            DecodeStep(block_table_BM=table_BM, seq_lens_B=context_lens_B + i + 1, query_len=1)
            for i in range(self._steps - 1)
        ]
