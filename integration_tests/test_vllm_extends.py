"""What follows from the kernel that decode takes: which query tokens it is asked for, its own, and tiles of prefill in
latent space where it takes them; and whether graphs capture it."""

import pytest
import torch
from vllm_config import vllm_config

pytest.importorskip("vllm")

from mla_backend.vllm_adapter import backend
from mla_backend.vllm_adapter.metadata import MLAMetadataBuilder
from mla_kernels import Device

H200 = Device("cuda", 90, "NVIDIA H200", 132, False, 141 << 30)


@pytest.mark.parametrize(
    ("kernel", "prefill", "cache", "query_len"),
    [
        ("auto", None, "auto", 4),  # tiles of 64 query rows
        ("auto", "FLASH_ATTN", "auto", 1),
        ("gluon_sm90", None, "auto", 4),
        ("gluon_sm90", None, "fp8", 4),
        ("no_such_kernel", None, "auto", 4),
    ],
)
def test_query_tokens_of_decode(monkeypatch, kernel, prefill, cache, query_len):
    monkeypatch.setattr(backend, "device_of", lambda where: H200)
    monkeypatch.setenv("MLA_BACKEND_DECODE", kernel)
    config = vllm_config(heads=16, prefill=prefill, device="cuda")
    problem = backend.make_problem(config, dtype=torch.bfloat16, kv_cache_dtype=cache)
    assert problem.max_query_len == query_len
    reasons = backend.refusals(config, dtype=torch.bfloat16, kv_cache_dtype=cache, page_size=64, use_mla=True)
    assert bool(reasons) == (kernel == "no_such_kernel"), reasons


@pytest.mark.parametrize(("kernel", "support"), [("auto", "UNIFORM_BATCH"), ("flashinfer_mla", "NEVER")])
def test_graphs_of_decode(monkeypatch, kernel, support):
    """A kernel that plans on the host is refused no server: vLLM leaves it out of graphs, or says which mode can."""
    monkeypatch.setattr("mla_kernels.flashinfer_calls.find_spec", lambda name: True)
    monkeypatch.setattr(backend, "device_of", lambda where: H200)
    monkeypatch.setenv("MLA_BACKEND_DECODE", kernel)
    config = vllm_config(heads=16, device="cuda")
    config.model_config.dtype, config.cache_config.cache_dtype = torch.bfloat16, "auto"
    asked = {"dtype": torch.bfloat16, "kv_cache_dtype": "auto", "page_size": 64, "use_mla": True}
    assert backend.refusals(config, **asked) == []
    assert MLAMetadataBuilder.get_cudagraph_support(config, None).name == support


def test_flashinfer_under_batch_invariance(monkeypatch):
    monkeypatch.setattr("mla_kernels.flashinfer_calls.find_spec", lambda name: True)
    monkeypatch.setattr(backend, "device_of", lambda where: H200)
    monkeypatch.setenv("MLA_BACKEND_DECODE", "flashinfer_mla")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    config = vllm_config(heads=16, device="cuda")
    config.model_config.max_model_len = 4096
    reasons = backend.refusals(config, dtype=torch.bfloat16, kv_cache_dtype="auto", page_size=64, use_mla=True)
    assert "flashinfer_mla: cuts requests where the batch wants it, got splits of 384 tokens" in " ".join(reasons)
