"""Kernels are tested on the GPU that is there, or else in Triton's interpreter."""

import os
import sys

# Two test processes on two cores: more threads for small tensors wait for one another, and take twice the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import quick_packing
import torch

from mla_kernels.device import device_of, interpreting

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel module is imported
if interpreting():
    from quick_interpreter import make_quick

    make_quick()
quick_packing.make_quick()


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """Tests change what launches depend on, such as a kernel's limits. What needs Triton is not imported for it."""
    if repeats := sys.modules.get("mla_kernels.repeats"):
        repeats.forget()


@pytest.fixture
def place():
    """place(kernel, problem): "cuda" or "cpu", the first of the two where the kernel runs; skips if it runs nowhere."""

    def find(kernel, problem) -> str:
        reasons = []
        for where in ("cuda", "cpu") if torch.cuda.is_available() and not interpreting() else ("cpu",):
            refused = kernel.unsupported(problem, device_of(where))
            if not refused:
                return where
            reasons += refused
        pytest.skip("; ".join(reasons))

    return find
