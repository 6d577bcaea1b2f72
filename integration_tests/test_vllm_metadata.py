"""vLLM's batch description becomes decode steps: uniform, ragged, and with padding that no request owns."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mla_backend.shards import Shards
from mla_backend.vllm_adapter.backend import max_decode_query_len
from mla_backend.vllm_adapter.metadata import MLAMetadataBuilder

THRESHOLD = 4


@pytest.fixture
def builder():
    """Its __init__ wants an engine; what is tested here wants these."""
    made = object.__new__(MLAMetadataBuilder)
    made._most_untiled, made._most_tokens, made.device = THRESHOLD, 16, torch.device("cpu")
    made._token_buffers = cache(made._make_token_buffers)
    return made


def decode_step(builder, query_start: list[int], num_decode_tokens: int, *, all_seq_lens=None):
    """What `_build_decode` makes of a batch. all_seq_lens: of all ranks, where they share the cache."""
    starts = torch.tensor(query_start, dtype=torch.int32)
    batch = len(query_start) - 1
    return builder._build_decode(
        block_table_tensor=torch.arange(batch, dtype=torch.int32)[:, None],
        seq_lens_device=torch.full((batch,), 9, dtype=torch.int32),
        max_seq_len=9,
        query_start_loc_cpu=starts,
        query_start_loc_device=starts,
        num_decode_tokens=num_decode_tokens,
        dcp_tot_seq_lens_device=None if all_seq_lens is None else torch.tensor(all_seq_lens, dtype=torch.int32),
    ).step


@pytest.mark.parametrize(
    ("query_start", "tokens", "query_len", "ragged"),
    [
        ([0, 1, 2, 3], 3, 1, False),
        ([0, 3, 6], 6, 3, False),
        ([0, 1, 4, 6], 6, THRESHOLD, True),
        ([0, 1, 2, 3], 4, THRESHOLD, True),  # one token of padding
        ([0, 2, 2, 4], 4, THRESHOLD, True),  # a request without tokens
        ([0, 0], 0, 0, False),
    ],
)
def test_decode_step(builder, query_start, tokens, query_len, ragged):
    step = decode_step(builder, query_start, tokens)
    assert (step.query_len, step.query_start_B1 is not None) == (query_len, ragged)


@pytest.mark.parametrize(
    ("query_start", "tokens", "all_seq_lens", "rows", "pages"),
    [
        ([0, 3, 6], 6, [10, 5], [4, 4, 5, 1, 2, 2], [0, 0, 0, 1, 1, 1]),
        ([0, 1, 4], 4, [1, 8], [0, 3, 3, 4], [0, 1, 1, 1]),  # nothing of the first request is here
        ([0, 2, 2, 3], 5, [10, 0, 4], [4, 5, 2, 0, 0], [0, 0, 2, 2, 2]),  # a request without tokens, two of padding
        ([0, 1, 2], 3, [10, 9], [5, 4, 0], [0, 1, 1]),
    ],
)
def test_decode_step_of_a_rank_that_shares_the_cache(builder, query_start, tokens, all_seq_lens, rows, pages):
    """The second of two ranks, with every other position: a token is a request that sees every other row."""
    builder._shards = Shards(ranks=2, rank=1)
    step = decode_step(builder, query_start, tokens, all_seq_lens=all_seq_lens)
    assert (step.query_len, step.query_start_B1) == (1, None)
    assert step.seq_lens_B.tolist() == rows
    assert step.block_table_BM.flatten().tolist() == pages
    again = decode_step(builder, [0, 2], 2, all_seq_lens=[4])
    for name in ("seq_lens_B", "block_table_BM"):
        assert getattr(again, name).data_ptr() == getattr(step, name).data_ptr(), "a captured graph reads there"


def test_lengths_of_a_rank_follow_from_those_of_all(builder):
    """vLLM's own count drafts that were not taken (9 here). Its tensor is corrected in place: a captured graph reads
    there, and so does what merges the ranks' answers."""
    builder._shards = Shards(ranks=2, rank=1)
    step = decode_step(builder, [0, 1, 2, 3], 3, all_seq_lens=[18, 17, 5])
    assert step.seq_lens_B.tolist() == [9, 8, 2]
    assert step.query_start_B1 is None


@pytest.mark.parametrize(
    ("speculative", "most"),
    [
        (None, 1),
        (SimpleNamespace(num_speculative_tokens=3, parallel_drafting=False), 4),
        (SimpleNamespace(num_speculative_tokens=3, parallel_drafting=True), 7),
        (SimpleNamespace(num_speculative_tokens=None, parallel_drafting=False), 1),
    ],
    ids=["none", "three", "three-parallel", "unknown"],
)
def test_most_query_tokens_of_a_request(speculative, most):
    """Scratch is reserved for this many; vLLM's own threshold is the same number."""
    assert max_decode_query_len(speculative) == most
