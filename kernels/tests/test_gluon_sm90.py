"""What can be tested of the Hopper decode kernel without a Hopper GPU: what it refuses, and its scratch.

See also test_decode_schedule.py, test_split_merge.py and test_compile.py.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hopper_devices import H200, NOT_HOPPER

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, format_of

pytest.importorskip("triton")
KERNEL = next(k for k in OPERATIONS["decode"] if k.name == "gluon_sm90")

GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


FP8 = torch.float8_e4m3fn


def problem_for(*, dtype=torch.bfloat16, cache=None, page_size=64, max_query_len=1, **geometry):
    layout = CacheLayout(geometry=replace(GEOMETRY, **geometry), format=format_of(cache or dtype), page_size=page_size)
    return Problem(layout=layout, dtype=dtype, max_query_len=max_query_len)


DTYPES = "needs bfloat16 or float16 queries, and a cache of the same or fp8, got"
TOO_MANY_ROWS = {"num_heads": 128, "max_query_len": 67}


@pytest.mark.parametrize(
    ("problem", "device", "reasons"),
    [
        *((problem_for(), device, reasons) for device, reasons in NOT_HOPPER),
        (problem_for(dtype=torch.float32), H200, [f"{DTYPES} torch.float32 queries and fp32 cache"]),
        (problem_for(cache=torch.float16), H200, [f"{DTYPES} torch.bfloat16 queries and fp16 cache"]),
        (problem_for(kv_lora_rank=256), H200, ["needs latent 512 + rope 64 or 0, got 256 + 64"]),
        (problem_for(qk_rope_head_dim=32), H200, ["needs latent 512 + rope 64 or 0, got 512 + 32"]),
        (problem_for(**TOO_MANY_ROWS), H200, ["needs heads x query tokens of 8448 or less, got 8576"]),
        (problem_for(cache=FP8, **TOO_MANY_ROWS), H200, ["needs heads x query tokens of 8448 or less, got 8576"]),
        *(
            (
                replace(problem_for(cache=cache), split_tokens=384, max_seq_len=4096),
                H200,
                [f"needs a 16-bit cache for fixed splits, got {name} and splits of 384 tokens"],
            )
            for cache, name in ((FP8, "fp8"), (torch.uint8, "fp8_ds_mla"))
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refusals(problem, device, reasons):
    assert KERNEL.unsupported(problem, device) == reasons


def test_refusals_come_all_at_once():
    problem = problem_for(dtype=torch.float32, kv_lora_rank=256, **TOO_MANY_ROWS)
    assert KERNEL.unsupported(problem, replace(H200, arch=80)) == [
        "needs sm_90, got NVIDIA H200 sm_80",
        f"{DTYPES} torch.float32 queries and fp32 cache",
        "needs latent 512 + rope 64 or 0, got 256 + 64",
        "needs heads x query tokens of 8448 or less, got 8576",
    ]


@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 96, 128, 192])
@pytest.mark.parametrize(("heads", "query_len"), [(1, 1), (5, 4), (128, 66)])
def test_what_it_takes(heads, query_len, page_size):
    for dtype, rope in product((torch.bfloat16, torch.float16), (64, 0)):
        problem = problem_for(
            dtype=dtype, page_size=page_size, num_heads=heads, qk_rope_head_dim=rope, max_query_len=query_len
        )
        assert KERNEL.unsupported(problem, H200) == []


@pytest.mark.parametrize(("heads", "query_len"), [(1, 1), (5, 4), (128, 66)])
def test_what_it_takes_of_fp8(heads, query_len):
    caches = (FP8, torch.uint8)
    for dtype, rope, page_size, cache in product((torch.bfloat16, torch.float16), (64, 0), (1, 16, 48, 64), caches):
        shape = {"num_heads": heads, "qk_rope_head_dim": rope, "max_query_len": query_len}
        assert KERNEL.unsupported(problem_for(dtype=dtype, cache=cache, page_size=page_size, **shape), H200) == []


def test_scratch_suffices_for_every_query_length():
    """A server reserves once, for the most query tokens; every step with fewer must fit: two slots a part."""
    heads_and_tokens = product((1, 2, 5, 8, 12, 16, 20, 64, 128), (1, 2, 4, 9, 16))
    for (heads, most), cache in product(heads_and_tokens, (None, FP8)):
        problem = problem_for(cache=cache, num_heads=heads, max_query_len=most)
        values, lse, plan = KERNEL.load().workspace(problem, H200, max_requests=1000)
        assert values == ((lse[0][0] * GEOMETRY.kv_lora_rank,), torch.float32)
        for query_len in range(1, most + 1):
            rows = query_len * heads
            parts = max(1, H200.num_sms // -(-rows // (64 if rows > 32 else 32)))
            assert 2 * parts * rows <= lse[0][0], (heads, most, query_len, cache)
            assert 4 * (1 + parts) <= plan[0][0]


def test_an_old_gluon_is_a_reason(monkeypatch):
    """Triton 3.5 has a Gluon in which every name of ours exists and the kernel does not compile."""
    monkeypatch.setattr("mla_kernels.hopper.KNOWN_GLUON", False)
    assert KERNEL.unsupported(problem_for(), H200) == [
        "needs the Gluon of Triton 3.6 or newer, got one whose warp_specialize takes other arguments"
    ]
