"""What a step allocates is known before vLLM serves, and fits into what its profile of memory leaves."""

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mla_backend.memory import CONTEXT_ROWS
from mla_backend.vllm_adapter import compat, memory
from mla_backend.vllm_adapter.impl import MLAImpl
from mla_kernels import CacheLayout, MLAGeometry, Problem, format_of


def problem(heads: int, **splits) -> Problem:
    geometry = MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    layout = CacheLayout(geometry=geometry, format=format_of(torch.bfloat16), page_size=64)
    return Problem(layout=layout, dtype=torch.bfloat16, **splits)


def server(tokens=8192, requests=256, context=131072, page=64, ranks=1, interleave=1):
    """What our code, and vLLM's for its own chunks, read of a server's config."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=requests),
        cache_config=SimpleNamespace(block_size=page),
        model_config=SimpleNamespace(max_model_len=context),
        parallel_config=SimpleNamespace(decode_context_parallel_size=ranks, cp_kv_cache_interleave_size=interleave),
        speculative_config=None,
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


@pytest.mark.parametrize("heads", [16, 128])
def test_a_batch_invariant_step_takes_queries_and_outputs_of_all_tokens(heads):
    invariant = problem(heads, split_tokens=1024, max_seq_len=131072)
    latent, lse, gathered = 8192 * heads * 512 * 2, 8192 * heads * 4, CONTEXT_ROWS * 576 * 2
    tables = 8192 // max(1, 64 // heads) * (131072 // 64) * 4  # tiles of 64 query rows
    assert memory.step_bytes(server(), invariant) == 2 * latent + lse + gathered + tables
    assert memory.step_bytes(server(), invariant) <= memory.profiled_bytes(server(), invariant)


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


@pytest.mark.parametrize(("ranks", "interleave"), [(8, 64), (3, 1), (5, 16)])
def test_ranks_that_share_the_cache_gather_whole_rounds(ranks, interleave):
    shared = server(ranks=ranks, interleave=interleave)
    rows = memory.context_rows(shared)
    assert rows % (ranks * interleave) == rows % 64 == 0
    assert CONTEXT_ROWS - 64 * ranks * interleave < rows <= CONTEXT_ROWS
    assert memory.step_bytes(shared, problem(16)) > memory.step_bytes(server(), problem(16))


def implementation(heads: int, vllm_config, *, own_prefill=True, beside=lambda tokens, keys: 0) -> MLAImpl:
    """beside: what a call of the prefill kernel takes.

    A layer of a server; its __init__ wants an engine, and what is tested here wants these. No config is current, as
    in steps of vLLM without requests."""
    made = object.__new__(MLAImpl)
    made._vllm_config = vllm_config
    made.attention = SimpleNamespace(problem=problem(heads), prefill_bytes=lambda *, tokens, keys: beside(tokens, keys))
    made.own_prefill = own_prefill
    made._scratch_shapes, made._device = (), torch.device("cpu")
    return made


@pytest.mark.parametrize(("context", "own_prefill", "taken"), [(131072, True, 0), (512, True, 1), (512, False, 0)])
def test_the_profile_of_0_33_counts_what_is_left(monkeypatch, context, own_prefill, taken):
    config, sizes, empty = server(context=context, requests=8), [], torch.empty
    made = implementation(16, config, own_prefill=own_prefill)
    monkeypatch.setattr(torch, "empty", lambda size, **options: sizes.append(size) or empty(0, **options))
    made.reserve_workspace()
    left = memory.step_bytes(config, problem(16)) - memory.profiled_bytes(config, problem(16))
    assert sizes == [left * taken]
    assert (left > 0) == (context == 512)


@pytest.mark.parametrize(
    ("context", "counted", "said"),
    [
        (131072, False, r"takes up to [\d.]+ MiB beside scratch, and vLLM's profile of memory left it 512.0$"),
        (512, True, "profile of memory counted them$"),
        (512, False, "left it 32.0 only: leave the rest free, .*--max-num-batched-tokens"),
    ],
)
def test_the_log_says_whether_there_is_room(monkeypatch, context, counted, said):
    config = server(context=context, requests=8)
    monkeypatch.setattr(compat, "counts_our_steps", lambda: counted)
    assert re.search(said, implementation(16, config)._say_memory(config))


def test_a_prefill_kernel_may_take_more(monkeypatch):
    """Of as many keys as a step's new tokens are, or a chunk of context, whichever is larger."""
    plain = implementation(16, server())._step_memory(server())
    more = implementation(16, server(), beside=lambda tokens, keys: 1000 * tokens + keys)._step_memory(server())
    assert (more[0] - plain[0], more[1]) == (8192 * 1000 + CONTEXT_ROWS, plain[1])
    many = server(tokens=20000)
    most = implementation(16, many, beside=lambda tokens, keys: keys)._step_memory(many)
    assert most[0] - implementation(16, many)._step_memory(many)[0] == 20000


def test_scratch_without_the_memory_of_vllm_is_shared_and_reserved(monkeypatch):
    """On a CPU vLLM has no workspace; layers then share one of ours, and nobody allocates in a step."""
    layers = [implementation(16, server()) for _ in range(2)]
    for layer in layers:
        layer._scratch_shapes = (((7,), torch.float32),)
    first, second = (layer._scratch()[0] for layer in layers)
    assert first.data_ptr() == second.data_ptr() == layers[0]._scratch()[0].data_ptr()
