"""What the layers of a step use one after another."""

import pytest
import torch

from mla_backend import scratch
from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.scratch import StepMemory
from mla_backend.steps import PrefillStep, plan_context
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of

CPU = torch.device("cpu")
SMALL = MLAGeometry(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)


@pytest.fixture
def captured(monkeypatch):
    """Say that a CUDA graph captures."""
    monkeypatch.setattr(scratch, "_is_capturing", lambda device: True)


def test_every_counter_is_another_zero(monkeypatch):
    fills, zeros, memory = [], torch.zeros, StepMemory()
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: fills.append(shape) or zeros(*shape, **options))
    counters = [memory.counter(CPU) for _ in range(150)]
    for i, counter in enumerate(counters):
        assert counter == 0
        assert counter.dtype == torch.int32
        counter += i + 1
    assert [int(counter) for counter in counters] == list(range(1, 151))
    assert len(fills) == 3


def test_layers_share_memory_for_the_lse():
    memory, q = StepMemory(), torch.zeros(5, 2, 6, dtype=torch.bfloat16)
    first = memory.lse_of(q)
    assert (first.shape, first.dtype) == ((5, 2), torch.float32)
    assert memory.lse_of(q.clone()) is first
    assert memory.lse_of(q[1:]).shape == (4, 2)


def test_a_graph_takes_nothing_of_the_step(captured):
    memory, q = StepMemory(), torch.zeros(5, 2, 6)
    assert memory.counter(CPU) is None
    assert memory.lse_of(q) is not memory.lse_of(q)


def test_a_graph_takes_nothing_that_was_made_before(monkeypatch):
    memory, q = StepMemory(), torch.zeros(5, 2, 6)
    memory.counter(CPU)
    before = memory.lse_of(q)
    monkeypatch.setattr(scratch, "_is_capturing", lambda device: True)
    assert memory.counter(CPU) is None
    assert memory.lse_of(q) is not before


@pytest.mark.parametrize("takes_counter", [True, False])
def test_kernels_that_count_get_a_counter_for_each_call(takes_counter):
    """In the new tokens' call and in that of each chunk."""
    dtype = torch.float32
    layout = CacheLayout(geometry=SMALL, format=format_of(dtype), page_size=4)
    problem = Problem(layout=layout, dtype=dtype)
    attention = MLAAttention(problem, Device("cpu"), MLABackendConfig(), scale=1.0)
    seen = []
    attention._takes_counter = takes_counter
    attention._run["prefill"] = lambda *args, **options: seen.append(options.get("counter"))
    step = PrefillStep(
        query_start_B1=torch.tensor([0, 3], dtype=torch.int32),
        max_query_len=3,
        block_table_BM=torch.zeros(1, 3, dtype=torch.int32),
        chunks=plan_context([3], [9], most_keys=5, device=CPU),
        gather_buffer_SK=torch.zeros(5, SMALL.latent_dim),
    )
    for _ in range(2):
        attention.prefill(
            torch.zeros(3, 2, 6), torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(layout.shape(3)), step,
            up_project=lambda latent: latent.new_zeros(len(latent), 2, 8), out_TNV=torch.zeros(3, 2, 4),
        )  # fmt: skip
    assert len(seen) == 6
    if takes_counter:
        assert len({counter.data_ptr() for counter in seen}) == 6
    else:
        assert seen == [None] * 6
