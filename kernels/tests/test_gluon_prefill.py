"""What can be tested of the Hopper prefill kernel without a Hopper GPU: what it refuses, and what it remembers.

See also test_gluon_prefill_emulated.py and test_compile.py.
"""

import gc
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from hopper_devices import H200, NOT_HOPPER

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, format_of

pytest.importorskip("triton")
KERNEL = next(k for k in OPERATIONS["prefill"] if k.name == "gluon_sm90_ragged")

GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def problem_for(*, dtype=torch.bfloat16, cache=None, **geometry):
    layout = CacheLayout(geometry=replace(GEOMETRY, **geometry), format=format_of(cache or dtype), page_size=64)
    return Problem(layout=layout, dtype=dtype)


WIDTHS = "needs nope and rope of multiples of 64, 256 together at most, got"


@pytest.mark.parametrize(
    ("problem", "device", "reasons"),
    [
        *((problem_for(), device, reasons) for device, reasons in NOT_HOPPER),
        (
            problem_for(dtype=torch.float32),
            H200,
            ["queries must be bfloat16 or float16, got torch.float32"],
        ),
        (problem_for(qk_rope_head_dim=32), H200, [f"{WIDTHS} 128 + 32"]),
        (problem_for(qk_nope_head_dim=96), H200, [f"{WIDTHS} 96 + 64"]),
        (problem_for(qk_nope_head_dim=256), H200, [f"{WIDTHS} 256 + 64"]),
        (problem_for(v_head_dim=192), H200, ["needs v of 64, 128 or 256, got 192"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refusals(problem, device, reasons):
    assert KERNEL.unsupported(problem, device) == reasons


def test_refusals_come_all_at_once():
    problem = problem_for(dtype=torch.float32, qk_rope_head_dim=32, v_head_dim=96)
    assert KERNEL.unsupported(problem, replace(H200, arch=80)) == [
        "needs sm_90, got NVIDIA H200 sm_80",
        "queries must be bfloat16 or float16, got torch.float32",
        f"{WIDTHS} 128 + 32",
        "needs v of 64, 128 or 256, got 96",
    ]


def test_an_old_gluon_is_a_reason(monkeypatch):
    monkeypatch.setattr("mla_kernels.hopper.KNOWN_GLUON", False)
    assert KERNEL.unsupported(problem_for(), H200) == [
        "needs the Gluon of Triton 3.6 or newer, got one whose warp_specialize takes other arguments"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_it_takes_fits(dtype):
    """Whatever the cache holds, and with blocks for every width."""
    for nope, rope, v in product((64, 128, 192, 256), (0, 64, 128), (64, 128, 256)):
        if nope + rope > 256:
            continue
        widths = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": v}
        for cache in (None, torch.float8_e4m3fn):
            assert KERNEL.unsupported(problem_for(dtype=dtype, cache=cache, num_heads=5, **widths), H200) == []
        assert KERNEL.load()._block(H200, nope + rope, v) in (64, 128)


def test_descriptors_are_found_again_and_keep_no_memory():
    from mla_kernels.tma import describe

    def described(x):
        return describe(x.data_ptr(), *KERNEL.load()._rows_of(x).in_boxes(64, 64))

    x = torch.zeros(30, 4, 128, dtype=torch.bfloat16)
    first = described(x)
    assert described(x.view_as(x)) is first
    assert described(x[1:]) is not first
    assert (first.shape, first.strides) == ([30, 512], [512, 1])
    freed = weakref.ref(x)
    del x
    gc.collect()
    assert freed() is None


def test_tensors_that_tma_cannot_read_are_copied():
    for_tma = KERNEL.load()._for_tma
    wide = torch.arange(20 * 5 * 208, dtype=torch.bfloat16).view(20, 5, 208)
    whole, heads = wide[..., :192], wide[:, 1:, 8:200]
    rope = wide[:, :1, 16:80].expand(-1, 5, -1)
    for good in (whole, heads, rope, wide[::2]):
        assert for_tma(good) is good
    odd = torch.zeros(20, 5, 196, dtype=torch.bfloat16)[..., :192]  # 2 bytes x 980 are no multiple of 16
    for bad in (wide[..., 3:195], odd, wide.transpose(0, 1)):
        copy = for_tma(bad)
        assert copy is not bad
        assert copy.is_contiguous()
        assert torch.equal(copy, bad)


def test_widths_that_no_copy_helps_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 8 values, got \(20, 3, 100\)"):
        KERNEL.load()._for_tma(torch.zeros(20, 3, 100, dtype=torch.bfloat16))
