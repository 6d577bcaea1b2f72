"""Which query tokens decode is asked for: its own, and tiles of prefill in latent space where its kernel takes them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mla_backend.vllm_adapter import backend
from mla_kernels import Device

H200 = Device("cuda", 90, "NVIDIA H200", 132, False, 141 << 30)


def server(prefill=None) -> SimpleNamespace:
    shape = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_attention_heads=16, **shape)),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1, use_ubatching=False),
        attention_config=SimpleNamespace(mla_prefill_backend=prefill and SimpleNamespace(name=prefill)),
        cache_config=SimpleNamespace(block_size=64),
        speculative_config=None,
        device_config=SimpleNamespace(device_type="cuda"),
    )


@pytest.mark.parametrize(
    ("kernel", "prefill", "cache", "query_len"),
    [
        ("auto", None, "auto", 4),  # tiles of 64 query rows
        ("auto", "FLASH_ATTN", "auto", 1),
        ("gluon_sm90", None, "auto", 4),
        ("gluon_sm90_few", None, "auto", 1),  # takes 32 query rows
        ("gluon_sm90_few", None, "fp8", 1),
        ("no_such_kernel", None, "auto", 4),
    ],
)
def test_query_tokens_of_decode(monkeypatch, kernel, prefill, cache, query_len):
    monkeypatch.setattr(backend, "device_of", lambda where: H200)
    monkeypatch.setenv("MLA_BACKEND_DECODE", kernel)
    problem = backend.make_problem(server(prefill), dtype=torch.bfloat16, kv_cache_dtype=cache)
    assert problem.max_query_len == query_len
    reasons = backend.refusals(server(prefill), dtype=torch.bfloat16, kv_cache_dtype=cache, page_size=64, use_mla=True)
    assert bool(reasons) == (kernel == "no_such_kernel"), reasons
