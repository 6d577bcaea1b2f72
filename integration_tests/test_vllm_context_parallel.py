"""Decode context parallelism in vLLM: ranks hold a share of every request's cache each. Its real engine, on a CPU,
gives the tokens and log-probabilities of transformers."""

from functools import partial

import pytest
import torch
from harness import assert_same_answers, prompts

pytest.importorskip("vllm")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# Ranks are processes of their own; vLLM asks for their cores where ranks outnumber NUMA nodes.
TWO_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_two_ranks(engine, checkpoints, oracle):
    """Prompts in pieces, over cached context of both ranks; prefixes from the cache; several query tokens a request, of
    uneven number; a request of one token, of which the second rank has nothing."""
    folder, phrase = checkpoints(), prompts((9,))[0]
    batch = [phrase * 5, phrase[:4] * 8, *prompts((1, 131, 200))]
    run = engine(
        folder,
        [batch, batch],
        tensor_parallel_size=2,
        decode_context_parallel_size=2,
        cp_kv_cache_interleave_size=4,
        block_size=16,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        speculative_config=NGRAM,
        max_tokens=20,
        env=TWO_PROCESSES,
    )
    for answers in run.rounds:
        assert_same_answers(answers, oracle(folder, batch, 20))
    assert [answer["cached"] for answer in run.rounds[1]] == [32, 0, 0, 128, 192]
    assert run.metrics["vllm:spec_decode_num_accepted_tokens"] > 0
    said = [line for line in run.log.splitlines() if "mla_backend 0" in line]
    assert len(said) == 2, "each rank says it"
    assert all("2 heads, latent 512" in line and "decode of 4 heads over a part of the cache" in line for line in said)


@pytest.fixture(scope="module")
def config(checkpoints):
    from vllm.engine.arg_utils import EngineArgs

    parallel = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    options = {"attention_backend": "CUSTOM", "dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    return EngineArgs(model=str(checkpoints()), **options, **parallel).create_engine_config()


@pytest.fixture
def refusals(config):
    from mla_backend.vllm_adapter import backend

    asked = {"dtype": torch.float32, "kv_cache_dtype": "auto", "page_size": 16, "use_mla": True}
    return partial(backend.refusals, config, **asked)


def test_batch_invariance_is_refused_by_name(refusals, monkeypatch):
    from mla_backend.vllm_adapter import backend

    assert refusals() == []
    monkeypatch.setattr(backend.envs, "VLLM_BATCH_INVARIANT", True)
    assert len(refusals()) == 1
    assert "needs --decode-context-parallel-size 1, got 2: in which order the ranks' answers" in refusals()[0]


def test_older_cpu_engines_are_refused_by_name(refusals, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    assert refusals() == ["on a CPU --decode-context-parallel-size needs vLLM 0.32 or newer, got size 2; leave it out"]


def test_slots_of_a_rank():
    """Rows that other ranks have go nowhere; so does padding."""
    from mla_backend.vllm_adapter.cpu_kernels import slot_mapping

    starts = torch.tensor([0, 5, 8], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 4, 9, 10, 11, 0, 0])
    table = torch.tensor([[7, 0], [3, 5]], dtype=torch.int32)
    slots = torch.full((12,), 99)
    slot_mapping(8, 12, starts, positions, table, 2, slots, 4, 2, 1, 2)
    # Pages of 4 rows, every other two positions: 2, 3 are rows 0, 1 of page 7; 10, 11 rows 4, 5, so 0, 1 of page 5.
    assert slots.tolist() == [-1, -1, 28, 29, -1, -1, 20, 21, -1, -1, -1, -1]
