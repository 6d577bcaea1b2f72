"""Head widths of published models: every decode and prefill kernel that takes them, against the float64 reference."""

import pytest
import torch

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, format_of
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode, make_prefill

WIDTHS = {  # latent, nope, rope, v
    "DeepSeek, Kimi, LongCat, Youtu": (512, 128, 64, 128),
    "GLM-4.7-Flash": (512, 192, 64, 256),
    "no rope": (512, 256, 0, 256),
    "Mistral Small 4": (256, 64, 64, 128),
    "MiniCPM3": (256, 64, 32, 64),
    "latent of 128": (128, 64, 32, 64),
}


@pytest.fixture(params=WIDTHS)
def geometry(request):
    latent, nope, rope, v = WIDTHS[request.param]
    return MLAGeometry(num_heads=3, kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v)


def problem_of(geometry, page_size=16):
    return Problem(
        layout=CacheLayout(geometry=geometry, format=format_of(torch.float32), page_size=page_size),
        dtype=torch.float32,
        max_query_len=2,
    )


@pytest.mark.parametrize("kernel", OPERATIONS["decode"], ids=lambda k: k.name)
def test_decode(kernel, geometry, place):
    case = make_decode(geometry, [70, 3], query_lens=2, device=place(kernel, problem_of(geometry)))
    out, lse = kernel.run(*case.arrays, **case.options)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", OPERATIONS["prefill"], ids=lambda k: k.name)
def test_prefill(kernel, geometry, place):
    case = make_prefill(geometry, [70, 3], device=place(kernel, problem_of(geometry)))
    out, lse = kernel.run(*case.arrays, **case.options)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float32])
