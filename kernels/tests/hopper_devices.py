"""A Hopper GPU, devices that kernels for one refuse, with their reasons, the mark of tests that need one, and
DeepSeek's shape."""

from dataclasses import replace

import pytest
import torch

from mla_kernels import Device, MLAGeometry

H200 = Device("cuda", 90, "NVIDIA H200", 132)
NOT_HOPPER = (
    (replace(H200, arch=80), ["needs sm_90, got NVIDIA H200 sm_80"]),
    (replace(H200, arch=100), ["needs sm_90, got NVIDIA H200 sm_100"]),
    (Device("hip", "gfx942", "MI300X", 304), ["needs sm_90, got MI300X gfx942"]),
    (Device("cpu"), ["needs sm_90, got cpu"]),
    (Device("cpu", interpreted=True), ["needs sm_90, got cpu, Triton interpreter"]),
    (replace(H200, interpreted=True), ["needs a GPU: Triton's interpreter does not run Gluon"]),
)

NEEDS_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


def geometry(heads: int) -> MLAGeometry:
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
