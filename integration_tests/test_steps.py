"""Plans that serve any engine: chunks of cached context, the cheaper way through a prefill, trees of draft tokens."""

from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backend import steps
from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.steps import (
    LATENT_COST,
    DecodeStep,
    PrefillStep,
    TiledStep,
    expanding_is_cheaper,
    plan_context,
    plan_prefill,
)
from mla_backend.tree import TreeAttention, TreeStep, ancestors_of
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of, reference

SMALL = MLAGeometry(num_heads=3, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
DEEPSEEK = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
CPU = Device("cpu")


def problem(page_size=4):
    layout = CacheLayout(geometry=SMALL, format=format_of(torch.float32), page_size=page_size)
    return Problem(layout=layout, dtype=torch.float32, max_query_len=8)


def paged_cache(page_size, pages=40):
    torch.manual_seed(0)
    return torch.randn(problem(page_size).layout.shape(pages))


lens = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50)), min_size=1, max_size=6)


@given(lens=lens, most_keys=st.integers(1, 70))
@settings(deadline=None)
def test_chunks_hold_each_cached_position_once(lens, most_keys):
    query_lens, context_lens = zip(*lens, strict=True)
    seen = set()
    for chunk in plan_context(query_lens, context_lens, most_keys=most_keys, device=torch.device("cpu")):
        assert 0 < chunk.num_keys <= most_keys
        requests = range(chunk.requests.start, chunk.requests.stop)
        ends = chunk.key_start_B1.tolist()
        assert (ends[0], ends[-1]) == (0, chunk.num_keys)
        assert chunk.max_key_len == max(b - a for a, b in pairwise(ends))
        assert chunk.query_start_B1.diff().tolist() == [query_lens[r] for r in requests]
        assert chunk.query_start_B1[-1] == chunk.tokens.stop - chunk.tokens.start
        assert chunk.tokens.start == sum(query_lens[: requests.start])
        assert chunk.max_query_len == max(query_lens[r] for r in requests)
        for i, request in enumerate(requests):
            first = int(chunk.starts_B[i])
            here = {(request, first + n) for n in range(ends[i + 1] - ends[i])}
            assert not here & seen
            seen |= here
    assert seen == {(r, position) for r, context in enumerate(context_lens) for position in range(context)}


class Prefill:
    """Requests with cached context whose new tokens lie in the cache already, behind it, since latent space reads them
    there."""

    def __init__(self, query_lens, context_lens, *, most_keys: int):
        self.attention = MLAAttention(problem(), CPU, MLABackendConfig(), scale=0.3)
        self.query_lens, self.context_lens, requests = query_lens, context_lens, len(query_lens)
        pages = max(q + c for q, c in zip(query_lens, context_lens, strict=True)) // 4 + 1
        self.cache = paged_cache(4, pages=requests * pages)
        self.starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        self.table = torch.randperm(requests * pages).view(requests, pages).to(torch.int32)
        self.seq_lens = torch.tensor([q + c for q, c in zip(query_lens, context_lens, strict=True)], dtype=torch.int32)
        rows = [self.cache[table.long()].flatten(0, 1) for table in self.table]
        lens = zip(rows, context_lens, self.seq_lens, strict=True)
        self.new = torch.cat([row[context:end] for row, context, end in lens])
        self.up = torch.randn(SMALL.kv_lora_rank, SMALL.num_heads, SMALL.qk_nope_head_dim + SMALL.v_head_dim) / 6
        self.w_k, self.w_v = self.up.split([SMALL.qk_nope_head_dim, SMALL.v_head_dim], -1)
        self.q = torch.randn(sum(query_lens), SMALL.num_heads, SMALL.qk_head_dim)
        self.out = torch.full((*self.q.shape[:2], SMALL.v_head_dim), torch.nan)
        self.buffer = torch.full((most_keys, SMALL.latent_dim), torch.nan)

    def expand(self, step: PrefillStep) -> None:
        latent_and_rope = self.new.split([SMALL.kv_lora_rank, SMALL.qk_rope_head_dim], -1)
        up_project = partial(torch.einsum, "lnx,sl->snx", self.up)
        self.attention.prefill(self.q, *latent_and_rope, self.cache, step, up_project=up_project, out_TNV=self.out)

    def extend(self, step: TiledStep) -> None:
        weights = {"w_k_NPL": self.w_k.permute(1, 2, 0), "w_v_NLV": self.w_v.transpose(0, 1)}
        self.attention.extend(self.q, self.cache, step, **weights, out_TNV=self.out)

    def assert_right(self) -> None:
        q_nope, q_rope = self.q.double().split([SMALL.qk_nope_head_dim, SMALL.qk_rope_head_dim], -1)
        arrays = torch.einsum("tnp,lnp->tnl", q_nope, self.w_k.double()), q_rope, self.cache.double()
        starts = {"query_len": max(self.query_lens), "query_start_B1": self.starts}
        latent, _ = reference.decode(*arrays, self.table, self.seq_lens, scale=0.3, **starts)
        expected = torch.einsum("tnl,lnv->tnv", latent, self.w_v.double())
        torch.testing.assert_close(self.out, expected.to(self.out.dtype), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("most_keys", [7, 64, 1000])
def test_prefill_over_planned_chunks(most_keys):
    """Expanded, chunk by chunk, gives what latent space gives."""
    batch = Prefill([3, 9, 1, 5], [0, 37, 12, 21], most_keys=most_keys)
    step = PrefillStep(
        query_start_B1=batch.starts,
        max_query_len=9,
        block_table_BM=batch.table,
        chunks=plan_context(batch.query_lens, batch.context_lens, most_keys=most_keys, device=torch.device("cpu")),
        gather_buffer_SK=batch.buffer,
    )
    batch.expand(step)
    batch.assert_right()


# New and cached tokens of a request that stays in latent space, and of one that is expanded.
SHORT, LONG = (5, 90), (30, 90)


@pytest.mark.parametrize(
    "requests",
    [[SHORT], [LONG], [SHORT, LONG], [LONG, SHORT], [SHORT, LONG, SHORT, (3, 0), SHORT, SHORT], [(17, 400), LONG] * 3],
)
@pytest.mark.parametrize("absorbs", [True, False])
def test_each_request_goes_its_own_way(requests, absorbs, monkeypatch):
    """Few tiles at a time, so that requests in latent space come in several parts."""
    monkeypatch.setattr(steps, "TILES_AT_ONCE", 3)
    monkeypatch.setattr(steps, "TILE_ROWS", 6)
    query_lens, context_lens = zip(*requests, strict=True)
    batch = Prefill(query_lens, context_lens, most_keys=64)
    expanded, latent = plan_prefill(
        SMALL, query_lens, context_lens, query_start_B1=batch.starts, block_table_BM=batch.table,
        seq_lens_B=batch.seq_lens, gather_buffer_SK=batch.buffer, absorbs=absorbs,
    )  # fmt: skip
    gathered = sum(chunk.num_keys for chunk in expanded.chunks) if expanded else 0
    longer = sum(old for new, old in requests if new >= 30 or not absorbs)
    assert gathered == longer, "context of requests in latent space is not gathered"
    in_latent = {token for mine, _ in latent.parts for token in range(mine.start, mine.stop)} if latent else set()
    first = [0, *accumulate(query_lens)]
    ranges = [range(first[i], first[i + 1]) for i, (new, old) in enumerate(requests) if old and new < 30 and absorbs]
    assert in_latent == {token for tokens in ranges for token in tokens}
    if expanded:
        batch.expand(expanded)
    if latent:
        assert all(len(part.seq_lens_B) <= 3 for _, part in latent.parts)
        batch.extend(latent)
    batch.assert_right()


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "expands"),
    [
        ([100], [0], True),
        ([1], [5000], False),
        ([150], [100000], False),
        ([220], [100000], True),
        ([1, 4000], [100, 4000], True),
        ([1, 1, 20], [5000, 5000, 5000], False),
    ],
)
def test_short_answers_to_a_long_context_stay_in_latent_space(query_lens, context_lens, expands):
    assert expanding_is_cheaper(DEEPSEEK, query_lens, context_lens) is expands


@pytest.mark.parametrize("context", [1, 90, 70000])
def test_cost_is_counted_as_the_two_ways_multiply(context):
    """Multiplications of both ways, written out one by one."""
    g, ways = DEEPSEEK, set()
    expand = g.kv_lora_rank * (g.qk_nope_head_dim + g.v_head_dim)
    for query in range(1, 200):
        pairs = sum(context + t + 1 for t in range(query))
        latent = LATENT_COST * pairs * (g.latent_dim + g.kv_lora_rank) + query * expand
        expanded = pairs * (g.qk_head_dim + g.v_head_dim) + (query + context) * expand
        assert expanding_is_cheaper(g, [query], [context]) is (expanded <= latent)
        ways.add(expanded <= latent)
    assert ways == {True, False}


def tree_masks(trees, size, seed=0):
    """Random trees: each token sees itself and what its parent sees."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.eye(size, dtype=torch.bool).repeat(trees, 1, 1)
    for tree in visible:
        for token in range(1, size):
            parent = int(torch.randint(token, (1,), generator=generator))
            tree[token] |= tree[parent]
    return visible


@pytest.mark.parametrize("page_size", [1, 4])
def test_trees(page_size):
    """Each token sees its context and its ancestors: as a request of its own, with a copy of just those rows."""
    trees, size, context = 3, 6, torch.tensor([20, 5, 1], dtype=torch.int32)
    cache, visible = paged_cache(page_size, pages=160), tree_masks(trees, size)
    rows = cache.view(-1, SMALL.latent_dim)
    slots = torch.randperm(100 // page_size)[: trees * (24 // page_size)].view(trees, -1)
    table = slots.to(torch.int32)
    own_slots = torch.randperm(len(rows) - 100)[: trees * size].view(trees, size) + 100
    q_latent, q_rope = torch.randn(18, 3, SMALL.kv_lora_rank), torch.randn(18, 3, SMALL.qk_rope_head_dim)
    ancestors, seen = ancestors_of(visible, own_slots)
    step = TreeStep(
        tokens=size,
        context=DecodeStep(block_table_BM=table, seq_lens_B=context, query_len=1),
        ancestors=DecodeStep(block_table_BM=ancestors, seq_lens_B=seen, query_len=1),
    )
    attention = TreeAttention(
        replace(problem(page_size), max_query_len=size), CPU, MLABackendConfig(), scale=0.2, tokens=size
    )
    out, lse = attention.decode(q_latent, q_rope, cache, step)
    for tree in range(trees):
        cached = cache[table[tree].long()].flatten(0, 1)[: context[tree]]
        for token in range(size):
            i = tree * size + token
            keys = torch.cat([cached, rows[own_slots[tree][visible[tree, token]]]])
            wanted, wanted_lse = reference.decode(
                q_latent[i : i + 1],
                q_rope[i : i + 1],
                keys[None],
                torch.zeros(1, 1, dtype=torch.int32),
                torch.tensor([len(keys)], dtype=torch.int32),
                scale=0.2,
            )
            torch.testing.assert_close(out[i : i + 1], wanted.to(out.dtype), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[i : i + 1], wanted_lse.to(lse.dtype), atol=1e-5, rtol=1e-5)
