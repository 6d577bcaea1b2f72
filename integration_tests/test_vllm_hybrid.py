"""Models that have other attention beside MLA, through the real engine."""

import pytest
import torch
from harness import assert_same_answers, prompts
from serving_watch import STAND_IN

pytest.importorskip("vllm")

KIMI = {"arch": "kimi_linear", "layers": 4, "kv_lora_rank": 128, "rope": 32, "nope": 64, "v": 64}


def test_kimi_linear(engine, checkpoints, oracle):
    """Linear attention beside MLA that does not rotate, whose layers write the cache themselves and call our prefill
    and our decode past vLLM's usual layer.

    Pages are as large as a state of linear attention: 288 tokens, the multiple of 144 that holds it.
    """
    folder, lengths = checkpoints(**KIMI), (2, 17, 131, 450)
    batch = prompts(lengths)
    longer = [p + q for p, q in zip(batch, prompts((7,) * len(batch), seed=1), strict=True)]
    run = engine(
        folder,
        [batch, longer],
        kimi=True,
        max_tokens=6,
        block_size=144,
        max_num_batched_tokens=320,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
    )
    assert "Setting attention block size to 288 tokens" in run.log
    for answers, asked in zip(run.rounds, (batch, longer), strict=True):
        assert_same_answers(answers, oracle(folder, asked, 6))
    assert [answer["cached"] for answer in run.rounds[1]] == [n // 288 * 288 for n in lengths]
    assert set(run.calls) == {"decode:torch_decode", "prefill:torch_prefill"}


def test_nothing_is_compiled_while_kimi_linear_is_served(engine, checkpoints):
    """Its layers hand over queries as one tensor, which is another form of the kernel."""
    run = engine(
        checkpoints(**{**KIMI, "layers": 2, "kv_lora_rank": 512, "rope": 64}),
        [prompts((5,)), prompts((1, 30, 17)), prompts((3,) * 9, seed=4)],
        kimi=True,
        dtype="bfloat16",
        max_tokens=3,
        max_num_batched_tokens=256,
        env={STAND_IN: "H200"},
    )
    assert run.watch["early"] > 0
    assert run.watch["late"] == []
    assert set(run.calls) == {"decode:gluon_sm90", "prefill:gluon_sm90_ragged"}
    assert "vLLM's profile of memory left it 0.0 only" in run.log  # it leaves such layers out


@pytest.mark.parametrize("cuda", [True, False])
def test_kimi_linear_with_an_fp8_cache_is_refused(checkpoints, monkeypatch, cuda):
    """Its layers for CUDA would fail in the first prefill."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from mla_backend.vllm_adapter.backend import refusals

    arguments = {"dtype": "bfloat16", "attention_backend": "CUSTOM"}
    config = EngineArgs(str(checkpoints(**KIMI)), **arguments).create_engine_config()
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: cuda)
    for name, refused in (("fp8", cuda), ("auto", False)):
        reasons = refusals(config, dtype=torch.bfloat16, kv_cache_dtype=name, page_size=64, use_mla=True)
        assert any("Kimi-Linear want prefill in fp8" in reason for reason in reasons) is refused, reasons


def draft_model(folder):
    """An EAGLE draft with ordinary attention and random weights. A token costs it a third of what it costs MLA."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=96,
        max_position_embeddings=16384,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.0.{name}": tensor.shape for name, tensor in LlamaDecoderLayer(config, 0).state_dict().items()}
    del shapes["layers.0.input_layernorm.weight"]  # an EAGLE draft has none
    shapes["fc.weight"] = (256, 2 * 256)
    weights = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def test_mla_beside_ordinary_attention(engine, checkpoints, oracle, tmp_path):
    """Our backend for MLA alone, vLLM's own for the attention of a draft model in the same engine."""
    folder, batch = checkpoints(), prompts((2, 65, 131))
    draft = {"method": "eagle", "model": str(draft_model(tmp_path / "draft")), "num_speculative_tokens": 2}
    run = engine(
        folder,
        [batch, batch],
        attention_backend=None,
        attention_config={"backend_per_kind": {"mla_attention": "CUSTOM"}},
        speculative_config=draft,
        enable_prefix_caching=True,
    )
    for answers in run.rounds:
        assert_same_answers(answers, oracle(folder, batch))
    assert run.rounds[1][-1]["cached"] == 64
    assert run.metrics["vllm:spec_decode_num_drafts"] > 0
    assert {name.split(":")[0] for name in run.calls} == {"decode", "prefill", "cache_write"}
