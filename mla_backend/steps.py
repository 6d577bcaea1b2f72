"""One forward step in the terms of no engine: the tensors that attention needs beside queries, keys and the cache.

An engine's metadata builder makes them once a step; all layers share them. Shape suffixes as in mla_kernels.reference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch

from mla_backend.scratch import StepMemory
from mla_backend.shards import Shards
from mla_kernels import MLAGeometry


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """Requests whose few query tokens attend to the cache in latent space.

    block_table_BM: int32 page numbers.  seq_lens_B: int32, on the device, cached tokens with this step's.
    query_len: query tokens of every request, or the most of any if `query_start_B1` (int32) says where each begins.
    """

    block_table_BM: torch.Tensor
    seq_lens_B: torch.Tensor
    query_len: int
    query_start_B1: torch.Tensor | None = None

    @property
    def num_queries(self) -> int | None:
        """Query tokens of the step; None where only the device knows."""
        return None if self.query_start_B1 is not None else len(self.seq_lens_B) * self.query_len


@dataclass(frozen=True, kw_only=True)
class TiledStep:
    """Requests with any number of query tokens that attend in latent space, a few tokens at a time.

    parts: which of the step's query tokens, and the decode step of their tiles: each tile stands for a request whose
    last tokens it has, so that it sees the keys that its tokens see.  num_queries: query tokens of the step.
    """

    parts: tuple[tuple[slice, DecodeStep], ...]
    num_queries: int


@dataclass(frozen=True, kw_only=True)
class ContextShare:
    """What a rank gathers for a chunk of context where ranks share the cache: as many rows as any other, of which the
    last ones of a request may be nobody's.

    starts_B, key_start_B1, num_keys, max_key_len: as in ContextChunk, of this rank's rows.
    order_S: int64, which of all ranks' gathered rows, one rank behind another, make up the chunk.
    """

    starts_B: torch.Tensor
    key_start_B1: torch.Tensor
    max_key_len: int
    num_keys: int
    order_S: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ContextChunk:
    """A slice of cached context of neighbouring prefill requests, small enough to expand at once.

    requests, tokens: which prefill requests and which of the step's prefill tokens it is for.
    query_start_B1: starts of those requests' tokens within `tokens`, int32.   max_query_len: the longest.
    starts_B: first cached position of each request's slice, int32.
    key_start_B1: where its rows begin in the gathered chunk, int32; `num_keys` in all, `max_key_len` at most each.
    share: what of it this rank gathers, where ranks share the cache.
    """

    requests: slice
    tokens: slice
    query_start_B1: torch.Tensor
    max_query_len: int
    starts_B: torch.Tensor
    key_start_B1: torch.Tensor
    max_key_len: int
    num_keys: int
    share: ContextShare | None = None


@dataclass(frozen=True, kw_only=True)
class PrefillStep:
    """Requests whose new tokens attend to each other expanded, and to cached context chunk by chunk.

    query_start_B1: int32, starting at 0.  block_table_BM: int32.
    chunks: every (request, cached position) of the batch lies in exactly one.
    gather_buffer_SK: scratch that the largest chunk, or share of one, fits in; None when there are no chunks.
    all_gather: rows of this rank to those of all, one rank behind another; where ranks share the cache.
    memory: that layers use one after another.
    """

    query_start_B1: torch.Tensor
    max_query_len: int
    block_table_BM: torch.Tensor
    chunks: tuple[ContextChunk, ...] = ()
    gather_buffer_SK: torch.Tensor | None = None
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    memory: StepMemory = field(default_factory=StepMemory, compare=False)


TILE_ROWS = 64  # query rows of a tile: what the largest matrix instruction takes
TILES_AT_ONCE = 256


def tile_tokens(num_heads: int) -> int:
    """Query tokens of a tile."""
    return max(1, TILE_ROWS // num_heads)


def tile_queries(
    query_lens: Sequence[int],
    block_table_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    tokens_of_tile: int,
    requests: Sequence[int] | None = None,
) -> TiledStep:
    """Cut the query tokens of a batch into tiles, which see no more keys than they must.

    query_lens: of each request, known to the host.  block_table_BM, seq_lens_B: int32, on the device.
    requests: those that are to be cut, in ascending order; all without.
    """
    first_token = [0, *accumulate(query_lens)]
    tiles = [
        _Tile(request, first_token[request] + first, min(tokens_of_tile, tokens - first), tokens - first)
        for request in (range(len(query_lens)) if requests is None else requests)
        for tokens in (query_lens[request],)
        for first in range(0, tokens, tokens_of_tile)
    ]
    parts = tuple(_part(run, block_table_BM, seq_lens_B, tokens_of_tile) for run in _runs(tiles))
    return TiledStep(parts=parts, num_queries=first_token[-1])


class _Tile(NamedTuple):
    """first, count: query tokens of the batch.  left: those of its request from the first on."""

    request: int
    first: int
    count: int
    left: int


def _runs(tiles: list[_Tile]) -> Iterator[list[_Tile]]:
    """Tiles whose tokens follow one another, as many as may be attended to at once."""
    run: list[_Tile] = []
    for tile in tiles:
        if run and (len(run) == TILES_AT_ONCE or tile.first != run[-1].first + run[-1].count):
            yield run
            run = []
        run.append(tile)
    if run:
        yield run


def _part(tiles: list[_Tile], block_table_BM, seq_lens_B, tokens_of_tile: int) -> tuple[slice, DecodeStep]:
    counts = [tile.count for tile in tiles]
    requests, behind = [tile.request for tile in tiles], [tile.left - tile.count for tile in tiles]
    starts = [0, *accumulate(counts)]
    request_B, behind_B, query_start_B1 = _on_device(requests, behind, starts, device=seq_lens_B.device)
    step = DecodeStep(
        block_table_BM=block_table_BM.index_select(0, request_B),
        seq_lens_B=seq_lens_B.index_select(0, request_B) - behind_B,
        query_len=tokens_of_tile,
        query_start_B1=query_start_B1,
    )
    return slice(tiles[0].first, tiles[-1].first + tiles[-1].count), step


# How much longer a multiplication takes in latent space than over expanded heads, all that either way does beside it
# counted in. `mla-backend bench crossover` measures it: on an H200 (2026-11-27, Hopper's kernels) the two ways took
# equal time at 179 to 231 new tokens, 4096 to 65536 cached ones, 16 and 128 heads, for which it would be 0.80 to 0.97.
# Other kernels are not measured.
LATENT_COST = 0.91


def expanding_is_cheaper(geometry: MLAGeometry, query_lens: Sequence[int], context_lens: Sequence[int]) -> bool:
    """Whether a batch of prefill requests takes less time over expanded heads than in latent space.

    In latent space each (query, key) costs K multiplications for its score and L for its value; expanded Q and V, and
    each key's up-projection L x (P + V) on top. In latent space each query pays that once, absorbed into it and out of
    its output. A short answer to a long cached context stays in latent space: with DeepSeek's numbers, up to about 195
    tokens.
    """
    latent = geometry.kv_lora_rank
    up_projection = latent * (geometry.qk_nope_head_dim + geometry.v_head_dim)
    saved_per_pair = LATENT_COST * (geometry.latent_dim + latent) - geometry.qk_head_dim - geometry.v_head_dim
    pairs = sum(new * context + new * (new + 1) // 2 for new, context in zip(query_lens, context_lens, strict=True))
    return pairs * saved_per_pair >= sum(context_lens) * up_projection


class Sharing(NamedTuple):
    """shards: who has which rows.  most_keys: rows of a chunk of context, of all ranks.  all_gather: every rank's rows,
    one rank's behind another's."""

    shards: Shards
    most_keys: int
    all_gather: Callable[[torch.Tensor], torch.Tensor]


def plan_prefill(
    geometry: MLAGeometry,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    query_start_B1: torch.Tensor,
    block_table_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    gather_buffer_SK: torch.Tensor,
    absorbs: bool = True,
    sharing: Sharing | None = None,
) -> tuple[PrefillStep | None, TiledStep | None]:
    """Let each prefill request attend where that is cheaper: over expanded heads, in latent space, or None for either.

    query_lens, context_lens: new and cached tokens of each request, known to the host.
    query_start_B1, block_table_BM, seq_lens_B: int32, on the device; lengths count new tokens, which are cached too.
    gather_buffer_SK: room for a chunk of context.  absorbs: whether there are weights to go into latent space with.
    sharing: with the ranks that share the cache. Then all requests attend over expanded heads: in latent space a rank
        would see its own rows alone.

    Where there are both, the first is for all requests: it attends as if those of the second had no context, and what
    that gives them the second replaces. So neither has to pick its queries from among the others'.
    """
    lens = list(zip(query_lens, context_lens, strict=True))
    absorbs = absorbs and sharing is None
    in_latent = [i for i, (new, old) in enumerate(lens) if absorbs and not expanding_is_cheaper(geometry, [new], [old])]
    latent = expanded = None
    if in_latent:
        tokens = tile_tokens(geometry.num_heads)
        latent = tile_queries(query_lens, block_table_BM, seq_lens_B, tokens_of_tile=tokens, requests=in_latent)
    if len(in_latent) < len(lens):
        elsewhere = set(in_latent)
        contexts = [0 if i in elsewhere else old for i, old in enumerate(context_lens)]
        expanded = PrefillStep(
            query_start_B1=query_start_B1,
            max_query_len=max(query_lens),
            block_table_BM=block_table_BM,
            chunks=plan_context(
                query_lens,
                contexts,
                most_keys=sharing.most_keys if sharing else len(gather_buffer_SK),
                device=gather_buffer_SK.device,
                shards=sharing.shards if sharing else None,
            ),
            gather_buffer_SK=gather_buffer_SK,
            all_gather=sharing.all_gather if sharing else None,
        )
    return expanded, latent


def plan_context(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    most_keys: int,
    device: torch.device,
    shards: Shards | None = None,
) -> tuple[ContextChunk, ...]:
    """Cut the cached context of a batch of prefill requests into chunks of at most `most_keys` rows.

    query_lens, context_lens: new and cached tokens of each request.
    shards: ranks that share the cache. Requests are then cut where it is the first rank's turn, every rank gathers the
        same number of rows, and `most_keys`, a multiple of a round, is what all of them gather at most.
    """
    first_token = [0, *accumulate(query_lens)]
    unit = shards.round if shards else 1
    return tuple(
        _context_chunk(pieces, query_lens, first_token, device, shards)
        for pieces in _cut_context(context_lens, most_keys, unit)
    )


def _cut_context(context_lens: Sequence[int], most_keys: int, unit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Chunks as (request, first position, rows) of each of their requests, in order: greedy, so that all but the last
    are full, of units of so many rows as well as can be."""
    pieces, room = [], most_keys // unit
    for request, context_len in enumerate(context_lens):
        start = 0
        while start < context_len:
            units = min(room, -(-(context_len - start) // unit))
            rows = min(units * unit, context_len - start)
            pieces.append((request, start, rows))
            start, room = start + rows, room - units
            if room == 0:
                yield pieces
                pieces, room = [], most_keys // unit
    if pieces:
        yield pieces


def _context_chunk(pieces, query_lens, first_token, device, shards: Shards | None) -> ContextChunk:
    """A chunk is for all requests from its first to its last: one between them that has no context brings no rows."""
    first, last = pieces[0][0], pieces[-1][0]
    start, rows = [0] * (last - first + 1), [0] * (last - first + 1)
    for request, position, count in pieces:
        start[request - first], rows[request - first] = position, count
    query_start = [token - first_token[first] for token in first_token[first : last + 2]]
    starts_B, key_start_B1, query_start_B1 = _on_device(start, [0, *accumulate(rows)], query_start, device=device)
    return ContextChunk(
        requests=slice(first, last + 1),
        tokens=slice(first_token[first], first_token[last + 1]),
        query_start_B1=query_start_B1,
        max_query_len=max(query_lens[first : last + 1]),
        starts_B=starts_B,
        key_start_B1=key_start_B1,
        max_key_len=max(rows),
        num_keys=sum(rows),
        share=_share(start, rows, shards, device) if shards else None,
    )


def _share(start: list[int], rows: list[int], shards: Shards, device: torch.device) -> ContextShare:
    """What each rank gathers of requests' slices that begin at the first rank's turn."""
    each = [-(-count // shards.round) * shards.interleave for count in rows]  # rows of a rank, rounded up
    key_start = [0, *accumulate(each)]
    position = torch.cat([torch.arange(count) for count in rows])
    rank, row = shards.place(position)
    order = rank * key_start[-1] + row + torch.tensor(key_start[:-1]).repeat_interleave(torch.tensor(rows))
    local_start = [position // shards.ranks for position in start]
    starts_B, key_start_B1 = _on_device(local_start, key_start, device=device)
    return ContextShare(
        starts_B=starts_B,
        key_start_B1=key_start_B1,
        max_key_len=max(each),
        num_keys=key_start[-1],
        order_S=(order.pin_memory() if device.type == "cuda" else order).to(device, non_blocking=True),
    )


def _on_device(*lists: list[int], device: torch.device) -> Sequence[torch.Tensor]:
    """Each list as int32, with one copy to the device for all."""
    pinned = device.type == "cuda"  # else the copy waits for the device
    numbers = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int32, pin_memory=pinned)
    return numbers.to(device, non_blocking=True).split([len(numbers) for numbers in lists])
