"""What a user sees who asks for something that we cannot do: every reason, what to change, and a vLLM that still
works."""

import pytest
from harness import changed

pytest.importorskip("vllm")

PROMPT = [[5, 6, 7, 8]]


def test_a_model_without_mla(engine, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    options = {"rounds": [PROMPT], "max_tokens": 2, "skip_tokenizer_init": True}
    failed = engine(tmp_path / "llama", fails=True, **options)
    assert "mla_backend serves MLA layers only" in failed.log
    assert "-ac.backend_per_kind.mla_attention CUSTOM" in failed.log
    works = engine(tmp_path / "llama", attention_backend=None, **options)
    assert len(works.rounds[0][0]["tokens"]) == 2
    assert not works.calls


def test_sparse_models_are_refused_by_name(engine, checkpoints, tmp_path):
    folder = changed(
        checkpoints(arch="v3", q_lora_rank=96),
        tmp_path,
        model_type="deepseek_v32",
        architectures=["DeepseekV32ForCausalLM"],
        index_topk=2048,
        index_n_heads=4,
        index_head_dim=128,
    )
    failed = engine(folder, [PROMPT], fails=True)
    assert "DeepSeek-V3.2 needs sparse MLA attention, which reads a few tokens" in failed.log


def test_every_reason_at_once(engine, checkpoints):
    failed = engine(
        checkpoints(),
        [PROMPT],
        fails=True,
        env={"MLA_BACKEND_DECODE": "triton_splitkv", "MLA_BACKEND_PREFILL": "fastest"},
    )
    assert "triton_splitkv: needs a GPU (or TRITON_INTERPRET=1), got cpu" in failed.log
    assert (
        "unknown prefill kernel 'fastest'; choose from auto, gluon_sm90_ragged, triton_ragged, torch_prefill"
        in failed.log
    )


def test_other_fp8_caches(engine, checkpoints):
    failed = engine(checkpoints(), [PROMPT], fails=True, kv_cache_dtype="fp8_e5m2")
    assert "takes --kv-cache-dtype auto, float16, bfloat16, fp8, fp8_e4m3, fp8_ds_mla, got " in failed.log
    assert "got fp8_e5m2 (values of another format, with a bit less); name one of them" in failed.log


def test_queries_in_fp8(engine, checkpoints):
    quantised = {"use_prefill_query_quantization": True}
    failed = engine(checkpoints(), [PROMPT], fails=True, kv_cache_dtype="fp8", attention_config=quantised)
    assert "multiplies in the model's dtype; leave out -ac.use_prefill_query_quantization" in failed.log


def test_odd_block_size(engine, checkpoints):
    failed = engine(checkpoints(), [PROMPT], fails=True, block_size=24)
    assert "needs a --block-size that is a multiple of 16, got 24" in failed.log


def test_disabled_is_as_if_not_installed(engine, checkpoints):
    """Without us, vLLM's CPU platform passes over the flag and says so; on a GPU it would refuse an empty slot."""
    run = engine(checkpoints(), [PROMPT], env={"MLA_BACKEND_DISABLE": "1"}, max_tokens=2)
    assert "Cannot use AttentionBackendEnum.CUSTOM backend on CPU" in run.log
    assert not run.calls


def test_without_the_flag_vllm_is_as_it_was(engine, checkpoints):
    run = engine(checkpoints(), [PROMPT], attention_backend="CPU_MLA", max_tokens=2)
    assert "mla_backend 0" not in run.log
    assert not run.calls
