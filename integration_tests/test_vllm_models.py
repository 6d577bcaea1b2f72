"""Families of MLA models through the real engine, and models that vLLM would not serve as MLA."""

import pytest
from harness import assert_same_answers, prompts

pytest.importorskip("vllm.config")
from vllm.transformers_utils import model_arch_config_convertor as arch

from mla_backend import models
from mla_backend.vllm_adapter import model_types

BATCH = prompts((2, 33, 131))
MINICPM3 = {"arch": "minicpm3", "kv_lora_rank": 256, "rope": 32, "nope": 64, "v": 64, "heads": 40, "hidden": 320}
# Head widths as published, few layers; what else is in them is small.
FAMILIES = {
    "GLM-4.7-Flash": ({"arch": "glm4_moe_lite", "nope": 192, "v": 256, "heads": 20, "hidden": 320}, {}),
    "Mistral Small 4": ({"arch": "v3", "kv_lora_rank": 256, "nope": 64}, {}),
    "MiniCPM3": (MINICPM3, {"model_impl": "transformers"}),
    "Youtu-LLM": ({"arch": "youtu"}, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(engine, checkpoints, oracle, family):
    shape, options = FAMILIES[family]
    folder = checkpoints(q_lora_rank=96, **shape)
    run = engine(folder, [BATCH], **options)
    assert_same_answers(run.rounds[0], oracle(folder, BATCH))
    assert {"decode:torch_decode", "prefill:torch_prefill"} <= set(run.calls)


def test_a_type_that_vllm_does_not_know(engine, checkpoints, oracle):
    """Its class has MLA layers, and only the name of its type is new."""
    folder = checkpoints()
    options = {"hf_overrides": {"model_type": "made_up"}}
    failed = engine(folder, [BATCH], fails=True, **options)
    assert "vLLM would give made_up (model_type made_up) none although it has a latent of 512" in failed.log
    assert "its cache would be 2 times as large; set MLA_BACKEND_MODEL_TYPES=made_up" in failed.log
    run = engine(folder, [BATCH], env={"MLA_BACKEND_MODEL_TYPES": "other, made_up"}, **options)
    assert_same_answers(run.rounds[0], oracle(folder, BATCH))


def test_a_model_that_vllm_expands(engine, checkpoints):
    failed = engine(checkpoints(q_lora_rank=96, **MINICPM3), [BATCH], fails=True)
    assert "MiniCPM3 has a latent cache, but vLLM's own code for it caches expanded heads, 22 times" in failed.log
    assert "its cache would be 22 times as large; add --model-impl transformers" in failed.log


def test_mla_switched_off(engine, checkpoints):
    failed = engine(checkpoints(), [BATCH], fails=True, env={"VLLM_MLA_DISABLE": "1"})
    assert "unset VLLM_MLA_DISABLE" in failed.log


class Text:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def converted(model_type, **fields):
    config = Text(model_type=model_type, **fields)
    return arch.MODEL_ARCH_CONFIG_CONVERTORS[model_type](config, config)


def test_convertors_are_chained_and_only_once(monkeypatch):
    class Theirs(arch.ModelArchConfigConvertorBase):
        def get_vocab_size(self):
            return 7

    table = {"with_one": Theirs}
    monkeypatch.setattr(arch, "MODEL_ARCH_CONFIG_CONVERTORS", table)
    model_types.teach(["with_one", "without"])
    once = dict(table)
    model_types.teach(["with_one", "without"])
    assert table == once
    latent = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "head_dim": 32}
    for name in ("with_one", "without"):
        assert converted(name, **latent).is_deepseek_mla()
        assert converted(name, **latent).get_head_size() == 288
        assert not converted(name, kv_lora_rank=None, head_dim=32).is_deepseek_mla()
    assert converted("with_one", **latent).get_vocab_size() == 7


def test_expanded_types_are_never_listed(monkeypatch):
    """vLLM's own code for them has no MLA layers: listing them would break it for everybody."""
    monkeypatch.setattr(arch, "MODEL_ARCH_CONFIG_CONVERTORS", {})
    model_types.teach(["minicpm3"])
    assert not converted("minicpm3", kv_lora_rank=256, head_dim=32).is_deepseek_mla()


def test_unlisted_types_are_taught_at_registration():
    from mla_backend.vllm_adapter import register

    register()
    for name in models.UNLISTED:
        latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        assert converted(name, **latent).get_head_size() == 576
