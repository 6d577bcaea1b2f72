"""Context parallelism: every request's cached rows are dealt out to ranks, each of which attends to its own.

With W ranks and an interleave of I, positions 0 .. I - 1 lie on rank 0, the next I on rank 1, and after rank W - 1
comes rank 0 again (vLLM's `get_dcp_local_seq_lens`). A rank keeps its rows one behind another, so its cache looks like
that of a shorter request. Answers of the ranks are merged by their LSE, which is the engine's work.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Who has which rows. Raises ValueError for a rank that is none of `ranks`, or rows dealt out by less than one."""

    ranks: int
    rank: int
    interleave: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks or self.interleave < 1:
            raise ValueError(f"wanted a rank of 0 .. ranks - 1 and an interleave of 1 or more, got {self}")

    @property
    def round(self) -> int:
        """Positions after which it is the first rank's turn again."""
        return self.ranks * self.interleave

    def rows(self, visible: torch.Tensor) -> torch.Tensor:
        """How many of a request's first `visible` positions (integers) lie on this rank."""
        rest = visible % self.round - self.rank * self.interleave
        return visible // self.round * self.interleave + rest.clamp(0, self.interleave)

    def place(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """On which rank positions (integers) lie, and which of its rows each is."""
        rank = position // self.interleave % self.ranks
        return rank, position // self.round * self.interleave + position % self.interleave


def tokens_as_requests(
    seq_lens_B: torch.Tensor, query_start_B1: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which request each of `num_tokens` query tokens belongs to, and how many cached positions it sees.

    A request's query tokens see one position more each, but on a rank one row more or none, which no mask of a request
    with several tokens says. So where ranks share the cache every token is a request of its own.

    seq_lens_B: cached positions of each request on all ranks, its query tokens among them; int32, on the device.
    query_start_B1: where each request's tokens begin; int32, there too. Tokens behind the last belong to none: they see
    nothing, and name the last request.
    Returns int64 request_T and int32 visible_T.
    """
    ends_B = query_start_B1[1:].contiguous()
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=seq_lens_B.device)
    request_T = torch.searchsorted(ends_B, token_T, right=True).clamp_(max=len(ends_B) - 1)
    end_T = ends_B[request_T]
    return request_T, torch.where(token_T < end_T, seq_lens_B[request_T] - end_T + token_T + 1, 0)


def weight_of(lse_WTN: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the answer of one of several ranks counts among all, so that weighted answers may be added up.

    lse_WTN: natural-log LSE of each rank's answers, -inf where it saw nothing.
    Returns float32 weight_TN = exp(lse of the rank - lse of all), 0 where nobody saw anything, and lse_TN of all.
    """
    total_TN = lse_WTN.float().logsumexp(0)
    return (lse_WTN[rank].float() - total_TN).exp().nan_to_num(0.0), total_TN
