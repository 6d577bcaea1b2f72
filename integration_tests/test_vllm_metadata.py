"""vLLM's batch description becomes decode steps: uniform, ragged, and with padding that no request owns."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mla_backend.vllm_adapter.backend import max_decode_query_len
from mla_backend.vllm_adapter.metadata import MLAMetadataBuilder

THRESHOLD = 4


def decode_step(query_start: list[int], num_decode_tokens: int):
    """What `_build_decode` makes of a batch; the builder's own state beside a threshold is not needed."""
    builder = object.__new__(MLAMetadataBuilder)
    builder._most_untiled = THRESHOLD
    starts = torch.tensor(query_start, dtype=torch.int32)
    batch = len(query_start) - 1
    return builder._build_decode(
        block_table_tensor=torch.zeros(batch, 1, dtype=torch.int32),
        seq_lens_device=torch.full((batch,), 9, dtype=torch.int32),
        max_seq_len=9,
        query_start_loc_cpu=starts,
        query_start_loc_device=starts,
        num_decode_tokens=num_decode_tokens,
        dcp_tot_seq_lens_device=None,
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
def test_decode_step(query_start, tokens, query_len, ragged):
    step = decode_step(query_start, tokens)
    assert (step.query_len, step.query_start_B1 is not None) == (query_len, ragged)


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
