"""What a step allocates is known before vLLM serves, and fits into what its profile of memory leaves."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mla_backend.memory import CONTEXT_ROWS
from mla_backend.vllm_adapter import compat, memory
from mla_kernels import CacheLayout, MLAGeometry, Problem, format_of


def problem(heads: int) -> Problem:
    geometry = MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    layout = CacheLayout(geometry=geometry, format=format_of(torch.bfloat16), page_size=64)
    return Problem(layout=layout, dtype=torch.bfloat16)


def server(tokens=8192, requests=256, context=131072, page=64):
    """What our code, and vLLM's for its own chunks, read of a server's config."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=requests),
        cache_config=SimpleNamespace(block_size=page),
        model_config=SimpleNamespace(max_model_len=context),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_step_fits_into_what_the_profile_counts(heads):
    """DeepSeek-V3 on 8, 2 and 1 GPUs, with vLLM's largest chunk of 65536 rows."""
    assert memory.context_rows(server()) == CONTEXT_ROWS
    assert memory.step_bytes(server(), problem(heads)) <= memory.profiled_bytes(server(), problem(heads))


@pytest.mark.parametrize("context", [1024, 2048, 4096, 32768])
def test_a_step_of_a_small_server_fits_too(context):
    small = server(tokens=1024, requests=16, context=context)
    assert memory.context_rows(small) <= CONTEXT_ROWS
    assert memory.step_bytes(small, problem(16)) <= memory.profiled_bytes(small, problem(16))


def test_a_step_that_does_not_fit_is_known():
    """More new tokens than vLLM's chunk has rows: their up-projection alone is larger."""
    small = server(tokens=8192, requests=8, context=512)
    assert memory.profiled_bytes(small, problem(16)) == 4096 * 16 * 256 * 2
    assert memory.step_bytes(small, problem(16)) > memory.profiled_bytes(small, problem(16))


@pytest.mark.parametrize(("packed", "rows"), [(True, CONTEXT_ROWS), (False, 65536)])
def test_rows_for_many_requests(monkeypatch, packed, rows):
    """Until vLLM 0.27 every request of a chunk has at least a page of it."""
    monkeypatch.setattr(compat, "packs_context", lambda: packed)
    assert memory.context_rows(server(requests=1024)) == rows
