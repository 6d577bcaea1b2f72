"""Launches past Triton: the code that Triton would have taken, for every kind of argument."""

import os

import pytest
import torch
import triton
import triton.language as tl
from workers import answer_of

from mla_kernels.launching import launch


def test_the_code_that_triton_takes():
    result = answer_of("launching_worker.py")
    assert not result["differences"]
    assert result["codes"] > 100
    assert result["heard"] == [4, 4], "hooks did not hear of a launch, with its four arguments"
    assert result["seen"] < result["launches"] / 10, "Triton saw launches that were in the table"


@triton.jit
def _add_kernel(x_ptr, number, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + number)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_the_interpreter():
    x = torch.zeros(8)
    for number in (1, 2):
        launch(_add_kernel, (1,), x, number, N=8)
    assert x.tolist() == [3] * 8
