"""What models.py reads in configs, as published ones write them."""

import pytest

from mla_backend.models import EXPANDED, UNLISTED, family_of, geometry_of, is_mla, mla_layers, text_config

V3 = {"num_attention_heads": 128, "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
V3 |= {"qk_rope_head_dim": 64, "v_head_dim": 128}
CONFIGS = {  # model_type, what differs from DeepSeek-V3's numbers, layers with a latent cache
    "DeepSeek-V3": ("deepseek_v3", {}, 61),
    "Kimi-Linear": (
        "kimi_linear",
        {"num_attention_heads": 32, "num_hidden_layers": 27, "linear_attn_config": {"full_attn_layers": [*range(7)]}},
        7,
    ),
    "LongCat-Flash": ("longcat_flash", {"num_hidden_layers": None, "num_layers": 28, "num_attention_heads": 64}, 56),
    "Ling 2.5": ("bailing_hybrid", {"num_hidden_layers": 40, "layer_group_size": 8}, 5),
    "GLM-4.7-Flash": (
        "glm4_moe_lite",
        {"num_attention_heads": 20, "qk_nope_head_dim": 192, "v_head_dim": 256, "num_hidden_layers": 47},
        47,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_models(name):
    model_type, changes, layers = CONFIGS[name]
    config = text_config(V3 | changes | {"model_type": model_type})
    assert is_mla(config)
    assert family_of(config).missing == ""
    assert geometry_of(config).num_heads == (V3 | changes)["num_attention_heads"]
    assert mla_layers(config) == layers


@pytest.mark.parametrize("part", ["text_config", "language_config", "llm_config"])
def test_the_language_model_of_a_multimodal_one(part):
    """Kimi-K2.5 and Kimi-VL wrap a DeepSeek-V3 config."""
    config = text_config({"model_type": "kimi_k25", part: V3 | {"model_type": "deepseek_v3"}})
    assert family_of(config).name.startswith("DeepSeek-V3")
    assert geometry_of(config).latent_dim == 576


@pytest.mark.parametrize("fields", [{"model_type": "deepseek_v32"}, {"model_type": "new_one", "index_topk": 2048}])
def test_sparse_models_lack_something(fields):
    assert "sparse MLA attention" in family_of(text_config(V3 | fields)).missing


def test_a_known_model_with_an_indexer_is_sparse():
    assert "sparse" in family_of(text_config(V3 | {"model_type": "deepseek_v3", "index_topk": 2048})).missing


def test_longcat_as_published():
    """Its config.json has num_layers and no model_type."""
    assert mla_layers(text_config(V3 | {"num_hidden_layers": None, "num_layers": 28})) == 56


@pytest.mark.parametrize("fields", [{"num_hidden_layers": -3}, {"linear_attn_config": {"kda_layers": [1]}}])
def test_layers_that_make_no_sense(fields):
    with pytest.raises(ValueError, match="its config"):
        mla_layers(text_config(V3 | fields))


def test_an_unknown_dense_model_is_named_by_its_type():
    family = family_of(text_config(V3 | {"model_type": "new_one"}))
    assert (family.name, family.missing, family.expanded) == ("new_one", "", False)


def test_no_mla():
    config = text_config({"model_type": "llama", "num_attention_heads": 8})
    assert not is_mla(config)
    with pytest.raises(ValueError, match=r"not an MLA model \(model_type llama\): its config has no kv_lora_rank, "):
        geometry_of(config)
    with pytest.raises(ValueError, match="must have num_hidden_layers of 1 or more, got None"):
        mla_layers(config)


def test_types_that_vllm_has_to_be_told_of():
    assert UNLISTED == ("sarvam_mla",)
    assert EXPANDED == ("minicpm3",)
