"""The text of the Hopper prefill kernel, executed on a CPU by gluon_emulator.py, against the float64 reference."""

import gluon_emulator
import pytest
import torch
from gluon_emulator import emulated

import mla_kernels.primitives as primitives
from mla_kernels import Device, MLAGeometry
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, RaggedCase, assert_matches, make_prefill

MODULES = ("hopper", "hopper_prefill", "prefill.gluon_sm90_ragged")
GPU = Device("cuda", 90, "a small Hopper", 5)
COUNTER = torch.zeros(1, dtype=torch.int32)


def build(**edits):
    *_, roles, kernel = emulated(*(f"mla_kernels.{name}" for name in MODULES), **edits)
    roles.LN_2 = primitives.LN_2.value
    kernel.device_of = lambda tensor: GPU
    kernel._counter = lambda device: COUNTER
    return kernel


@pytest.fixture(scope="module")
def kernel():
    return build()


def geometry(heads=2, nope=128, rope=64, v=128):
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v)


def check(kernel, shape, *lens, change=lambda case: case, **options):
    case = change(make_prefill(shape, *lens, dtype=torch.float16, **options))
    tokens, heads = case.arrays[0].shape[:2]
    wide = torch.full((tokens, heads + 1, shape.v_head_dim + 16), torch.nan, dtype=torch.float16)
    out = wide[:, :heads, : shape.v_head_dim]
    lse = torch.full((heads, tokens + 1), torch.nan).T[:tokens]  # heads first, as vLLM passes it
    COUNTER.zero_()
    kernel.run(*case.arrays, **case.options, out_TNV=out, lse_TN=lse)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float16])
    assert int(wide.isnan().sum()) == wide.numel() - out.numel(), "wrote beside the output"
    assert not COUNTER.any(), "the next launch would begin somewhere else"


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("lens", [[1, 0, 16, 63], [64, 65], [17, 129], [127, 128, 300]], ids=str)
def test_causal_lengths_around_every_edge(kernel, lens, needles):
    check(kernel, geometry(), lens, needles=needles)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65], [128, 400, 129]], ids=str)
def test_every_query_sees_every_key(kernel, key_lens, needles):
    check(kernel, geometry(), [20, 3, 165], key_lens, causal=False, needles=needles)
