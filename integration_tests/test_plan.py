"""`mla-backend plan`: its numbers against published ones, and what it says of what is no MLA model."""

import json

import pytest

from mla_backend.plan.estimate import GIB, Gpus, rows
from mla_backend.plan.kernels import kernels
from mla_backend.plan.model import load

V3 = {"model_type": "deepseek_v3", "num_attention_heads": 128, "num_hidden_layers": 61, "kv_lora_rank": 512}
V3 |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


@pytest.fixture
def v3(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    return tmp_path


def gpus(tensor_parallel=1, context_parallel=1, gib=100, weights=0):
    return Gpus(
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        memory_bytes=gib * GIB,
        share=0.5,
        weight_bytes=weights * GIB,
        bytes_per_s=4e12,
    )


def by_name(*arguments):
    return {row.name: row for row in rows(*arguments)}


def test_deepseek_v3(v3):
    """70,272 bytes a token in bf16 and 17.16 GiB for 256 Ki tokens (DeepSeek's "Insights" paper says 70.3 KB)."""
    model = load(v3)
    found = by_name(model, gpus(), 262144)
    assert found["MLA, bf16"].token_bytes == 70_272
    assert found["MLA, fp32"].token_bytes == 2 * 70_272
    assert found["MLA, fp8"].token_bytes == 61 * 576
    assert found["MLA, fp8_ds_mla"].token_bytes == 61 * 656
    assert found["MLA, fp8_ds_mla"].tokens == pytest.approx(1.756 * found["MLA, bf16"].tokens, rel=1e-3)
    assert round(found["MLA, bf16"].request_bytes / GIB, 2) == 17.16
    assert found["MLA, bf16"].tokens == 50 * GIB // 70_272
    assert found["MLA, bf16"].requests == 2
    assert found["MLA, bf16"].step_ms == pytest.approx(70_272 * 262144 / 4e9)
    assert found["MHA, bf16"].token_bytes == 61 * 128 * (192 + 128) * 2
    assert found["GQA, 8 groups, bf16"].token_bytes == 61 * 8 * (192 + 128) * 2
    assert found["MQA, bf16"].token_bytes == 61 * (192 + 128) * 2


def test_tensor_parallel_ranks_hold_the_whole_latent_and_a_share_of_the_heads(v3):
    model = load(v3)
    found = by_name(model, gpus(tensor_parallel=16), 4096)
    assert found["MLA, bf16"].rank_bytes == 70_272
    assert found["MHA, bf16"].rank_bytes == found["MHA, bf16"].token_bytes / 16
    assert found["GQA, 8 groups, bf16"].rank_bytes == found["MQA, bf16"].token_bytes, "no rank has less than a head"
    divided = by_name(model, gpus(tensor_parallel=16, context_parallel=4), 4096)
    assert divided["MLA, bf16"].rank_bytes == 70_272 / 4
    assert divided["MLA, bf16"].tokens == pytest.approx(4 * found["MLA, bf16"].tokens, abs=4)


def test_weights_leave_less(v3):
    model = load(v3)
    assert gpus(tensor_parallel=2, weights=60).pool_bytes == 20 * GIB
    nothing = by_name(model, gpus(weights=60), 4096)
    assert {row.tokens for row in nothing.values()} == {0}


def test_weights_beside_the_config_are_counted(v3):
    (v3 / "model-1.safetensors").write_bytes(b"x" * 700)
    (v3 / "model-2.safetensors").write_bytes(b"x" * 300)
    assert load(v3).weight_bytes == 1000
    assert load(v3 / "config.json").weight_bytes == 1000


def test_fields_that_transformers_knows(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minicpm3"}))
    model = load(tmp_path)
    assert (model.name, model.geometry.latent_dim, model.geometry.v_head_dim) == ("MiniCPM3", 288, 64)


def test_defaults_of_the_language_model_in_a_wrapper(tmp_path):
    pytest.importorskip("transformers")
    wrapper = {"model_type": "kimi_k25", "text_config": {"model_type": "deepseek_v3"}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    assert load(tmp_path).geometry.latent_dim == 576


def test_what_is_no_mla_model(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json must be a model's config\.json: .*No such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"must be a model's config\.json: Expecting"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must be a model's config\.json, got a JSON list"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "new", "num_attention_heads": 4}')
    with pytest.raises(ValueError, match=r"not an MLA model \(model_type new\)"):
        load(tmp_path)


def test_context_parallel_ranks_are_tensor_parallel_ranks():
    with pytest.raises(ValueError, match=r"--dcp must divide --tp .* got 3 and 4"):
        gpus(tensor_parallel=4, context_parallel=3)


def test_heads_are_divided_evenly(v3):
    with pytest.raises(ValueError, match="--tp must divide the model's 128 heads, got 3"):
        rows(load(v3), gpus(tensor_parallel=3), 4096)
    done = command(v3, "--tp", 3)
    assert done.exit_code == 1
    assert "--tp must divide" in done.stderr


def test_what_the_table_cannot_show(v3):
    assert "No weights are counted" in command(v3).stdout
    done = command(v3, "--tp", 8, "--dcp", 8, "--weights", 640)
    assert "No weights are counted" not in done.stdout
    assert "takes --decode-context-parallel-size in vLLM, not in SGLang" in done.stdout


def command(*words):
    runner = pytest.importorskip("typer.testing").CliRunner()
    from mla_backend.cli import application

    return runner.invoke(application(), ["plan", *map(str, words)])


def test_table(v3):
    done = command(v3, "--tp", 8, "--weights", 640, "--memory", 140)
    assert done.exit_code == 0
    assert "DeepSeek-V3" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "MLA, bf16" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        *("MLA, bf16", "70,272", "70,272", "745,654", "2", "17.16", "4.28 ms"),
    ]
    assert "Every tensor-parallel rank holds the whole latent" in " ".join(done.stdout.split())


def test_json_and_picture(v3, tmp_path):
    pytest.importorskip("matplotlib")
    done = command(v3, "--json", "--plot", tmp_path / "made" / "plan.png")
    found = json.loads(done.stdout)
    assert found["rows"][0]["token_bytes"] == 70_272
    assert found["model"]["geometry"]["num_heads"] == 128
    assert (tmp_path / "made" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_sparse_model_is_planned_and_said_not_to_be_served(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"model_type": "deepseek_v32", "index_topk": 2048}))
    done = command(tmp_path)
    assert done.exit_code == 0
    assert "does not serve it yet: it needs sparse MLA attention" in " ".join(done.stdout.split())


def test_a_mistake_is_exit_status_1(tmp_path):
    done = command(tmp_path)
    assert done.exit_code == 1
    assert "must be a model's config.json" in done.stderr


@pytest.mark.parametrize(
    ("architecture", "tensor_parallel", "decode"),
    [
        ("sm_90", 1, "gluon_sm90"),
        ("sm_80", 1, "triton_splitkv (not gluon_sm90: needs sm_90, got sm_80)"),
        ("gfx942", 8, "triton_splitkv"),
        ("cpu", 1, "torch_decode (not gluon_sm90: needs sm_90, got cpu; triton_splitkv: needs a GPU (or "),
        (
            "sm_75",
            1,
            "none: gluon_sm90: needs sm_90, got sm_75 triton_splitkv: needs sm_80 or newer, got sm_75 torch",
        ),
    ],
)
def test_kernels_of_an_architecture(v3, monkeypatch, architecture, tensor_parallel, decode):
    monkeypatch.delenv("MLA_BACKEND_DECODE", raising=False)
    found = kernels(load(v3), architecture, tensor_parallel)
    assert " ".join(found["decode"].split()).startswith(decode)
    assert list(found) == ["decode", "prefill", "cache write", "cache gather", "merge"]


def test_kernels_of_a_cache_format(v3, monkeypatch):
    """A kernel that cannot read fp8 says so; others need no GPU with fp8 instructions."""
    found = kernels(load(v3), "sm_80", 8, "fp8")
    assert found["decode"].startswith("triton_splitkv")
    assert found["cache write"] == "triton_write"
    assert kernels(load(v3), "sm_80", 8, "fp8_ds_mla")["decode"].startswith("triton_splitkv")
    assert kernels(load(v3), "sm_90", 8, "fp8")["decode"] == "gluon_sm90"
    assert kernels(load(v3), "sm_90", 8, "fp8_ds_mla")["decode"] == "gluon_sm90"
    monkeypatch.setenv("MLA_BACKEND_DECODE", "gluon_sm90")
    assert "torch.float32 queries and fp32 cache" in kernels(load(v3), "sm_90", 8, "fp32")["decode"]
    done = command(v3, "--cache", "fp8")
    assert "On sm_90, fp8 cache, pages of 64:" in done.stdout
    other = command(v3, "--cache", "int4")
    assert "--cache must be one of bf16, fp16, fp32, fp8, fp8_ds_mla, got 'int4'" in other.stderr


def test_an_architecture_that_is_none(v3):
    with pytest.raises(ValueError, match=r"such as sm_90.*got 'H200'"):
        kernels(load(v3), "H200", 1)
