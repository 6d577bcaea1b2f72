"""Attention of draft tokens that form a tree: each sees its request's cached context, itself and its ancestors.

No kernel knows of trees. The tokens of a request see its context alike, so there they are more heads of one query
token, and the context is read once. What each sees of the tree is a request of its own with a few pages of one token.
The two are merged by their LSE.
"""

from dataclasses import dataclass, replace

import torch

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.steps import DecodeStep
from mla_kernels import Device, Problem


@dataclass(frozen=True, kw_only=True)
class TreeStep:
    """A step whose requests bring trees of equal size, in the terms of two decode steps.

    tokens: of each tree.  context: one query token a request, over what is cached before the tree.
    ancestors: one request for each token of each tree, over pages of one token.
    """

    tokens: int
    context: DecodeStep
    ancestors: DecodeStep

    @property
    def num_queries(self) -> int:
        return len(self.context.seq_lens_B) * self.tokens


def ancestors_of(visible_BSS: torch.Tensor, slots_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables over pages of one token, and lengths, of what each token of each tree sees of its tree.

    visible_BSS: bool, whether token i of a tree sees its token j.   slots_BS: cache slots of the trees' tokens.
    Returns int32 [B * S, S], whose first entries count, and int32 [B * S].
    """
    size = visible_BSS.shape[-1]
    seen_first_BSS = visible_BSS.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    table_BSS = slots_BS[:, None, :].expand_as(seen_first_BSS).gather(-1, seen_first_BSS)
    return table_BSS.reshape(-1, size).to(torch.int32), visible_BSS.sum(-1, dtype=torch.int32).flatten()


class TreeAttention:
    """Decode of trees of `tokens` tokens. Arguments and errors as of MLAAttention."""

    def __init__(self, problem: Problem, device: Device, config: MLABackendConfig, *, scale: float, tokens: int):
        self._tokens, layout = tokens, problem.layout
        heads = replace(layout.geometry, num_heads=layout.geometry.num_heads * tokens)
        many_heads = replace(problem, layout=replace(layout, geometry=heads), max_query_len=1)
        single_tokens = replace(problem, layout=replace(layout, page_size=1), max_query_len=1)
        self._context = MLAAttention(many_heads, device, config, scale=scale, operations=("decode",))
        self._ancestors = MLAAttention(single_tokens, device, config, scale=scale, operations=("decode", "merge"))

    def parts(self, max_requests: int) -> tuple[tuple[MLAAttention, int], ...]:
        """What attends to the context and to the trees, and to how many requests of its own in a batch of so many."""
        return (self._context, max_requests), (self._ancestors, max_requests * self._tokens)

    def decode(
        self,
        q_latent_TNL,
        q_rope_TNR,
        cache_AGK,
        step: TreeStep,
        *,
        workspaces=(None, None),
        cache_scale=None,
    ):
        """Returns out_TNL in the queries' dtype and float32 natural-log lse_TN. T counts all tokens of all trees.

        workspaces: scratch for each of `parts`, as in MLAAttention.decode; both may be the same memory.
        """
        tokens, heads, _ = q_latent_TNL.shape
        trees = tokens // step.tokens
        together = (x.reshape(trees, step.tokens * heads, x.shape[-1]) for x in (q_latent_TNL, q_rope_TNR))
        options = {"workspace": workspaces[0], "cache_scale": cache_scale}
        out_BXL, lse_BX = self._context.decode(*together, cache_AGK, step.context, **options)
        out_TNL, lse_TN = out_BXL.reshape(tokens, heads, -1), lse_BX.reshape(tokens, heads)
        single_A1K = cache_AGK.view(-1, 1, cache_AGK.shape[-1])
        options["workspace"] = workspaces[1]
        part = self._ancestors.decode(q_latent_TNL, q_rope_TNR, single_A1K, step.ancestors, **options)
        self._ancestors.merge(out_TNL, lse_TN, *part)
        return out_TNL, lse_TN
