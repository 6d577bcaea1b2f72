"""Addresses past 2^31 elements without a GPU: Triton's interpreter computes them in the integers that a GPU would, and
memory that nobody touches is not there. On a GPU: test_gpu_addresses.py."""

import pytest
import torch

from mla_kernels import OPERATIONS, MLAGeometry
from mla_kernels.testing import make_decode, make_prefill, make_so_far

if torch.cuda.is_available():
    pytest.skip("tested on the GPU", allow_module_level=True)
interpreter = pytest.importorskip("triton.runtime.interpreter")

GEOMETRY = MLAGeometry(num_heads=2, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
FAR = 2**31 + 2**28  # elements
FP16 = torch.float16


@pytest.fixture(autouse=True)
def sparse_memory(monkeypatch):
    """The interpreter would copy all memory that a tensor lies in back to where it is."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last rows lie past FAR. Its memory is there where it is written."""
    stride = -(-FAR // (len(tensor) - 1) // 64) * 64
    storage = torch.empty(stride * (len(tensor) - 1) + tensor[0].numel(), dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride())).copy_(tensor)


def run(operation: str, *args, **options):
    return next(k for k in OPERATIONS[operation] if k.name.startswith("triton")).run(*args, **options)


def assert_equal(got, wanted) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q_latent", "q_rope", "cache"])
def test_decode(which):
    case = make_decode(GEOMETRY, [40, 20], query_lens=4, dtype=FP16)
    far = [spread(x) if i == which else x for i, x in enumerate(case.arrays)]
    wanted = run("decode", *case.arrays, **case.options)
    assert_equal(run("decode", *far, **case.options), wanted)
    out = spread(torch.zeros_like(wanted[0]))
    assert_equal(run("decode", *far, **case.options, out_TNL=out), wanted)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("which", [0, 1, 3, None], ids=["q", "k_nope", "v", "out"])
def test_prefill(which, accumulate):
    case = make_prefill(GEOMETRY, [38, 3], [40, 20], causal=False, dtype=FP16)
    (out, lse), options = make_so_far(case), case.options | {"accumulate": accumulate}
    wanted = run("prefill", *case.arrays, **options, out_TNV=out.clone(), lse_TN=lse.clone())
    far = [spread(x) if i == which else x for i, x in enumerate(case.arrays)]
    into = {"out_TNV": spread(out) if which is None else out.clone(), "lse_TN": lse.clone()}
    assert_equal(run("prefill", *far, **options, **into), wanted)


def test_cache_write_and_gather():
    rows = torch.randn(40, GEOMETRY.latent_dim, dtype=FP16)
    cache, slots = spread(torch.zeros(10, 4, GEOMETRY.latent_dim, dtype=FP16)), torch.randperm(40)
    run("cache_write", *rows.split([128, 64], -1), cache, slots)
    table, bounds = torch.arange(10, dtype=torch.int32)[None], torch.tensor([0, 40], dtype=torch.int32)
    out = spread(torch.zeros_like(rows))
    run("cache_gather", cache, table, bounds[:1], bounds, out, max_key_len=40)
    assert torch.equal(out[slots], rows)
