"""SGLang's batch description, turned into engine-neutral steps."""

from dataclasses import dataclass
from functools import cached_property

import torch

from mla_backend.steps import DecodeStep, PrefillStep, TiledStep, plan_context, tile_queries, tile_tokens
from mla_kernels import Problem


class PageTables:
    """Block tables of the requests of a batch, out of SGLang's table of token slots.

    SGLang keeps a slot for each token of a request, and gives slots out in whole pages: the page of every
    `page_size`-th slot is the request's block table.

    token_slots: int32 [requests, tokens], one row for each place in SGLang's pool of requests.
    """

    def __init__(self, token_slots: torch.Tensor, page_size: int):
        self._slots, self._page_size = token_slots, page_size

    @property
    def most_pages(self) -> int:
        return -(-self._slots.shape[1] // self._page_size)

    def make(self, rows_B: torch.Tensor, longest: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Block tables of the requests in `rows_B` of SGLang's pool, wide enough for `longest` tokens each: new ones,
        or written into the corner of `into` that they take, with as few launches as that needs, and no other."""
        tokens = min(max(longest, 1), self._slots.shape[1])
        slots = self._slots[:, : tokens : self._page_size]
        corner = None if into is None else into[: len(rows_B), : slots.shape[1]]
        if self._page_size == 1:
            return torch.index_select(slots, 0, rows_B, out=corner)
        return torch.floor_divide(slots.index_select(0, rows_B), self._page_size, out=corner)

    def make_branches(self, rows_B, context_lens_B, longest: int, *, branches: int, tokens: int) -> torch.Tensor:
        """New block tables of the branches of drafts: each request's context, then `tokens` tokens of one branch.

        Tokens of all branches follow the context one branch after another, so a page must be one token: `make_problem`
        refuses larger ones.
        """
        assert self._page_size == 1
        position_P = torch.arange(min(longest, self.most_pages), device=rows_B.device)
        branch_R = torch.arange(branches, device=rows_B.device)
        behind_BP = position_P >= context_lens_B[:, None]
        place_BRP = position_P + behind_BP[:, None] * (branch_R * tokens)[:, None]
        slots_BP = self._slots.index_select(0, rows_B)
        place_BRP = place_BRP.clamp(max=slots_BP.shape[1] - 1)  # only beyond what a branch has
        slots_BRP = slots_BP[:, None].expand(-1, branches, -1).gather(-1, place_BRP)
        return slots_BRP.flatten(0, 1)


@dataclass
class ExtendMetadata:
    """A batch of requests that bring any number of new tokens: what either way of attending to it needs.

    problem: of all layers.  query_lens, context_lens: new and cached tokens of each request.
    query_start_B1: int32, where each request's new tokens begin.  block_table_BM: over old and new tokens.
    seq_lens_B: int32, all tokens of each request.  most_keys: rows that a chunk of context may have.
    """

    problem: Problem
    query_lens: list[int]
    context_lens: list[int]
    query_start_B1: torch.Tensor
    block_table_BM: torch.Tensor
    seq_lens_B: torch.Tensor
    most_keys: int

    @cached_property
    def latent(self) -> DecodeStep | TiledStep:
        if self.problem.split_tokens:
            return tile_queries(
                self.query_lens,
                self.block_table_BM,
                self.seq_lens_B,
                tokens_of_tile=tile_tokens(self.problem.geometry.num_heads),
            )
        return DecodeStep(
            block_table_BM=self.block_table_BM,
            seq_lens_B=self.seq_lens_B,
            query_len=max(self.query_lens),
            query_start_B1=self.query_start_B1,
        )

    @cached_property
    def expanded(self) -> PrefillStep:
        device = self.block_table_BM.device
        chunks = plan_context(self.query_lens, self.context_lens, most_keys=self.most_keys, device=device)
        gathered = None
        if chunks:
            shape = (max(chunk.num_keys for chunk in chunks), self.problem.layout.row_elements)
            gathered = torch.empty(shape, dtype=self.problem.dtype, device=device)  # an up-projection follows
        return PrefillStep(
            query_start_B1=self.query_start_B1,
            max_query_len=max(self.query_lens),
            block_table_BM=self.block_table_BM,
            chunks=chunks,
            gather_buffer_SK=gathered,
        )


def extend_metadata(forward_batch, tables: PageTables, problem: Problem, *, most_keys: int) -> ExtendMetadata:
    """Metadata of a plain or mixed extend, whose lengths SGLang's scheduler knows on the host."""
    query_lens, context_lens = list(forward_batch.extend_seq_lens_cpu), list(forward_batch.extend_prefix_lens_cpu)
    longest = max(new + old for new, old in zip(query_lens, context_lens, strict=True))
    starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32, device=forward_batch.seq_lens.device)
    torch.cumsum(forward_batch.extend_seq_lens, 0, out=starts[1:])
    return ExtendMetadata(
        problem=problem,
        query_lens=query_lens,
        context_lens=context_lens,
        query_start_B1=starts,
        block_table_BM=tables.make(forward_batch.req_pool_indices, longest),
        seq_lens_B=forward_batch.seq_lens.to(torch.int32),
        most_keys=most_keys,
    )


def is_tree(spec_info) -> bool:
    """Whether tokens that are to be verified form a tree, not a chain."""
    return getattr(spec_info, "custom_mask", None) is not None and getattr(spec_info, "topk", None) != 1


def visible_in_tree(mask: torch.Tensor, context_lens_B: torch.Tensor, tokens: int) -> torch.Tensor:
    """bool [B, tokens, tokens]: which tokens of its tree each token sees.

    mask: SGLang's flat one, for each request a row for each token over its context and its tree. It need not cover
    requests behind those of a batch, which pad it for a graph.
    """
    tree = torch.arange(tokens, device=mask.device)
    width_B = context_lens_B + tokens
    first_B = (width_B * tokens).cumsum(0) - width_B * tokens
    row_BS = first_B[:, None] + tree * width_B[:, None] + context_lens_B[:, None]
    return mask[(row_BS[..., None] + tree).clamp(max=len(mask) - 1)]
