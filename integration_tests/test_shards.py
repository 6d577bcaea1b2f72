"""Ranks that share the cache: who has which rows, and attention of parts that together see what one rank would."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.shards import Shards, tokens_as_requests, weight_of
from mla_backend.steps import DecodeStep, PrefillStep, plan_context
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of, reference
from mla_kernels.testing import TOLERANCE, assert_matches

GEOMETRY = MLAGeometry(num_heads=3, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
PAGE = 8
PAGES = 12  # of each request on each rank
CPU = torch.device("cpu")

ranks = st.integers(1, 4)
interleaves = st.sampled_from([1, 2, 8])


def every_rank(count: int, interleave: int) -> list[Shards]:
    return [Shards(ranks=count, rank=rank, interleave=interleave) for rank in range(count)]


@given(ranks=ranks, interleave=interleaves)
@settings(deadline=None)
def test_each_position_lies_on_one_rank_behind_those_before_it(ranks, interleave):
    position = torch.arange(100, dtype=torch.int32)
    for shards in every_rank(ranks, interleave):
        rank, row = shards.place(position)
        mine = rank == shards.rank
        assert row[mine].tolist() == list(range(int(mine.sum())))
        before = torch.cat([torch.zeros(1), mine.cumsum(0)])
        assert torch.equal(shards.rows(torch.arange(101)), before.long())


def test_vllm_deals_out_rows_likewise():
    utils = pytest.importorskip("vllm.v1.attention.backends.utils")
    lens = torch.arange(200)
    for shards in every_rank(3, 4):
        theirs = utils.get_dcp_local_seq_lens(lens, shards.ranks, shards.rank, shards.interleave)
        assert torch.equal(shards.rows(lens), theirs.long())


@pytest.mark.parametrize("wrong", [{"ranks": 2, "rank": 2}, {"ranks": 2, "rank": 0, "interleave": 0}])
def test_impossible_ranks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"wanted a rank of 0 .. ranks - 1 and an interleave of 1 or more, got Shards"):
        Shards(**wrong)


def test_tokens_as_requests():
    """Uneven query lengths, a request without any, and two tokens of padding."""
    lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([10, 7, 3], [0, 3, 3, 5]))
    request, visible = tokens_as_requests(lens, starts, 7)
    assert request.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert visible.tolist() == [8, 9, 10, 2, 3, 0, 0]


def test_weights_of_ranks_add_up_to_one():
    """A rank that saw nothing has none; where nobody saw anything nobody has."""
    lse = torch.tensor([[3.0, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf]])[..., None]
    weights, totals = zip(*(weight_of(lse, rank) for rank in range(2)), strict=True)
    assert torch.allclose(weights[0][:, 0], torch.tensor([1 / (1 + torch.e**-2), 0.0, 0.0]))
    assert torch.allclose(weights[0] + weights[1], torch.tensor([[1.0], [1.0], [0.0]]))
    assert torch.equal(totals[0], lse.logsumexp(0))


lens = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=5)


@given(lens=lens, ranks=ranks, interleave=interleaves, rounds=st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_shares_of_a_chunk_make_up_the_chunk(lens, ranks, interleave, rounds):
    """Each request's positions come once and in order, and no rank gathers more than its part of the room."""
    query_lens, context_lens = zip(*lens, strict=True)
    shards = Shards(ranks=ranks, rank=0, interleave=interleave)
    room, seen = rounds * shards.round, [[] for _ in context_lens]
    for chunk in plan_context(query_lens, context_lens, most_keys=room, device=CPU, shards=shards):
        share = chunk.share
        assert share.num_keys * ranks <= room
        assert share.max_key_len == max(b - a for a, b in pairwise(share.key_start_B1.tolist()))
        assert len(share.order_S) == chunk.num_keys
        gathered = []  # what lies where when the ranks' rows stand one behind another
        for rank in range(ranks):
            rows = {shards_place(shards, p): p for p in range(100)}
            for i, first in enumerate(share.starts_B.tolist()):
                count = int(share.key_start_B1.diff()[i])
                gathered += [(chunk.requests.start + i, rows[rank, first + n]) for n in range(count)]
        for request, position in (gathered[i] for i in share.order_S.tolist()):
            seen[request].append(position)
    assert seen == [list(range(context)) for context in context_lens]


def shards_place(shards: Shards, position: int) -> tuple[int, int]:
    return tuple(int(x) for x in shards.place(torch.tensor(position)))


def attention(cache_format=torch.float32) -> MLAAttention:
    layout = CacheLayout(geometry=GEOMETRY, format=format_of(cache_format), page_size=PAGE)
    return MLAAttention(Problem(layout=layout, dtype=torch.float32), Device("cpu"), MLABackendConfig(), scale=0.2)


class Batch:
    """Requests on one rank, and the same dealt out to several: a cache of each, NaN where nobody's rows are."""

    def __init__(self, seq_lens: list[int], ranks: int, interleave: int, cache_format=torch.float32):
        torch.manual_seed(0)
        self.seq_lens, self.shards = torch.tensor(seq_lens, dtype=torch.int32), every_rank(ranks, interleave)
        self.cache_format, one = cache_format, Shards(ranks=1, rank=0)
        rows = [torch.randn(n, GEOMETRY.latent_dim) for n in seq_lens]
        self.whole = self._dealt(rows, one)
        self.caches = [self._dealt(rows, shards) for shards in self.shards]
        shuffled = torch.randperm(len(seq_lens) * PAGES, generator=torch.Generator().manual_seed(1))
        self.table = shuffled.int().view(len(seq_lens), PAGES)

    def _dealt(self, rows, shards: Shards) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        table = torch.randperm(len(rows) * PAGES, generator=generator).view(len(rows), PAGES)
        cache = torch.full((table.numel(), PAGE, GEOMETRY.latent_dim), torch.nan).to(self.cache_format)
        for pages, request_rows in zip(table, rows, strict=True):
            rank, row = shards.place(torch.arange(len(request_rows)))
            mine = rank == shards.rank
            slots = pages[row[mine] // PAGE] * PAGE + row[mine] % PAGE
            cache.view(-1, GEOMETRY.latent_dim)[slots] = request_rows[mine].to(self.cache_format)
        return cache


@pytest.mark.parametrize("cache_format", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(("count", "interleave"), [(2, 1), (3, 1), (2, 8)])
def test_decode_of_all_ranks_is_decode_of_one(count, interleave, cache_format):
    """Several query tokens, uneven; ranks without a row of a request; padding; an fp8 cache."""
    query_lens, padding = [4, 1, 3, 2], 2
    batch = Batch([40, 1, 3, 17], count, interleave, cache_format)
    starts = torch.tensor([0, 4, 5, 8, 10], dtype=torch.int32)
    tokens = sum(query_lens) + padding
    q = torch.randn(tokens, 3, 32), torch.randn(tokens, 3, 8)
    scale = torch.tensor(0.7) if cache_format != torch.float32 else None
    request, visible = tokens_as_requests(batch.seq_lens, starts, tokens)
    out, lse = torch.zeros(tokens, 3, 32), torch.full((tokens, 3), -torch.inf)
    for shards, cache in zip(batch.shards, batch.caches, strict=True):
        local = shards.rows(visible)
        step = DecodeStep(block_table_BM=batch.table[request], seq_lens_B=local, query_len=1)
        part, part_lse = attention(cache_format).decode(*q, cache, step, cache_scale=scale)
        assert part_lse.dtype == torch.float32
        assert torch.equal(part_lse == -torch.inf, (local == 0)[:, None].expand(-1, 3))
        assert not part[local == 0].any(), "no answer of a rank without rows"
        reference.merge(out, lse, part, part_lse)
    wanted, wanted_lse = reference.decode(
        *(x.double() for x in q), batch.whole.double(), batch.table, batch.seq_lens,
        scale=0.2, query_len=4, query_start_B1=starts, cache_scale=scale,
    )  # fmt: skip
    assert_matches("out", out, wanted, TOLERANCE[torch.float32])
    assert_matches("lse", lse, wanted_lse, TOLERANCE[torch.float32])


@pytest.mark.parametrize("cache_format", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(("count", "interleave", "room"), [(2, 1, 16), (3, 2, 24), (2, 8, 1000)])
def test_prefill_over_shares_of_a_context(count, interleave, room, cache_format):
    """Rank 0 gathers its rows, gets everybody's, and answers as if it had all of them."""
    new, old = [5, 3, 4], [33, 0, 60]
    batch = Batch(old, count, interleave, cache_format)
    mine, one = attention(cache_format), attention(cache_format)
    tokens = sum(new)
    q, latent, rope = torch.randn(tokens, 3, 24), torch.randn(tokens, 32), torch.randn(tokens, 8)
    weight = torch.randn(32, 3 * 28)
    starts = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    scale = torch.tensor(0.7) if cache_format != torch.float32 else None

    def answer(run, cache, chunks, **more):
        step = PrefillStep(
            query_start_B1=starts,
            max_query_len=5,
            block_table_BM=batch.table,
            chunks=chunks,
            gather_buffer_SK=torch.empty(1000, GEOMETRY.latent_dim),
            **more,
        )
        options = {"up_project": lambda x: (x @ weight).view(-1, 3, 28), "out_TNV": torch.empty(tokens, 3, 12)}
        return run.prefill(q, latent, rope, cache, step, **options, cache_scale=scale)

    shared = plan_context(new, old, most_keys=room, device=CPU, shards=batch.shards[0])
    waiting = iter(shared)

    def all_gather(rows_SK):
        chunk, gathered = next(waiting), [rows_SK]
        for cache in batch.caches[1:]:
            table = batch.table[chunk.requests]
            share, theirs = chunk.share, torch.zeros_like(rows_SK)
            one.gather(
                cache, table, share.starts_B, share.key_start_B1, theirs,
                max_key_len=share.max_key_len, cache_scale=scale,
            )  # fmt: skip
            gathered.append(theirs)
        return torch.cat(gathered)

    got = answer(mine, batch.caches[0], shared, all_gather=all_gather)
    wanted = answer(one, batch.whole, plan_context(new, old, most_keys=1000, device=CPU))
    assert_matches("out", got, wanted.double(), TOLERANCE[torch.float32])
