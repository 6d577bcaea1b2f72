"""What SGLang finds of us, and what it says when it cannot use us."""

import json
import os
import subprocess
import sys

import pytest
from harness import changed, prompts, run_sglang

pytest.importorskip("sglang")

LIST = (
    "from sglang.srt.plugins import load_plugins; load_plugins();"
    "from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES as names;"
    "from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS as made;"
    "print('NAMES', names.count('mla_backend'), 'mla_backend' in made)"
)


def python(code: str, **env) -> str:
    """What a process prints that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, "NAMES 1 True"),
        ({"SGLANG_PLUGINS": "mla_backend"}, "NAMES 1 True"),
        ({"SGLANG_PLUGINS": "another"}, "NAMES 0 False"),
        ({"MLA_BACKEND_DISABLE": "1"}, "NAMES 0 False"),
    ],
    ids=["default", "named", "others-only", "disabled"],
)
def test_sglang_finds_the_plugin(env, found):
    assert found in python(LIST, **env)


def test_registering_again_changes_nothing():
    assert "NAMES 1 True" in python("import mla_backend; mla_backend.register_sglang();" + LIST)


def test_registration_loads_no_kernel():
    code = LIST + "; import sys; print('LOADED', [m for m in sys.modules if m.startswith('mla_kernels.decode.')])"
    assert "LOADED []" in python(code)


def test_a_version_that_is_not_known():
    code = "import sglang; sglang.__version__ = '0.4.9';" + LIST
    log = python(code)
    assert "mla_backend is made for SGLang 0.5.13 to 0.5.23 and was not tested with 0.4.9" in log
    assert "NAMES 1 True" in log


def test_a_broken_sglang_goes_on_without_us():
    code = "import sys; sys.modules['sglang.srt.layers.attention.attention_registry'] = None;"
    log = python(code + "import mla_backend; mla_backend.register_sglang(); print('ALIVE')")
    assert "mla_backend could not register with this SGLang" in log
    assert "ALIVE" in log


def test_wrong_name(tmp_path, checkpoints):
    failed = run_sglang(tmp_path, checkpoints(), [prompts((5,))], attention_backend="mla_backent", fails=True)
    assert "mla_backent" in failed.log


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "it needs --kv-cache-dtype auto, bfloat16, fp8_e4m3, got fp8_e5m2"),
        ({"env": {"MLA_BACKEND_DECODE": "triton_splitkv"}}, "needs a GPU (or TRITON_INTERPRET=1), got cpu"),
        ({"env": {"MLA_BACKEND_DECODE": "fast"}}, "unknown decode kernel 'fast'; choose from auto, "),
    ],
    ids=["fp8_e5m2", "kernel-that-cannot", "kernel-that-is-not"],
)
def test_refusals(tmp_path, checkpoints, options, reason):
    failed = run_sglang(tmp_path, checkpoints(), [prompts((5,))], fails=True, **options)
    assert "--attention-backend mla_backend cannot serve this model here: " in failed.log
    assert reason in failed.log


def test_a_model_without_mla(tmp_path, checkpoints):
    """A Llama config: SGLang loads random weights for it."""
    folder = changed(checkpoints(), tmp_path, architectures=["LlamaForCausalLM"], model_type="llama")
    failed = run_sglang(tmp_path, folder, [prompts((5,))], load_format="dummy", fails=True)
    assert "it serves MLA models only, and SGLang takes this one for none" in failed.log


def doctor(*words, **env) -> dict:
    """What `mla-backend doctor --json` finds where SGLang is installed and vLLM is not, with its exit status."""
    code = "from mla_backend.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json", *map(str, words)],
        env={**os.environ, "TRITON_INTERPRET": "0", **env},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return {**json.loads(done.stdout), "status": done.returncode}


def faults(found: dict) -> list[str]:
    return [one["what"] for one in found["findings"] if one["level"] == "fault"]


def test_doctor(checkpoints):
    found = doctor(checkpoints(), "--page-size", 64, "--decode-attention-backend", "triton")
    assert found["status"] == 0
    assert found["facts"]["model"] == "DeepSeek-V2 (model_type deepseek_v2)"
    assert "pages of 64" in found["facts"]["problem"]
    assert found["facts"]["cache"] == "bf16, 1152 bytes a token and layer, 2,304 in 2 layers: 465,984 tokens a GiB"
    agree = [one["what"] for one in found["findings"] if one["what"].endswith("agrees with the reference")]
    assert len(agree) == 5
    (warning,) = [one["what"] for one in found["findings"] if one["level"] == "warning"]
    assert warning.startswith("decode is done by triton, ")


def test_doctor_of_an_fp8_cache(checkpoints):
    found = doctor(checkpoints(), "--kv-cache-dtype", "fp8_e4m3")
    assert found["status"] == 0
    assert "fp8 cache" in found["facts"]["problem"]
    assert found["facts"]["cache"].startswith("fp8, 576 bytes a token and layer, 1,152 in 2 layers: ")
    agree = [one["what"] for one in found["findings"] if one["what"].endswith("agrees with the reference")]
    assert len(agree) == 5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--kv-cache-dtype", "fp8_e5m2"], "it needs --kv-cache-dtype auto, bfloat16, fp8_e4m3, got fp8_e5m2"),
        (["--kv-cache-dtype", "mxfp8"], "it needs --kv-cache-dtype auto, bfloat16, fp8_e4m3, got mxfp8"),
        (["--no-such-option", "2"], "unrecognized arguments: --no-such-option 2"),
        (["--attention-backend", "fa3"], "these options choose fa3"),
        (["--tp-size", "3"], "--tp-size must divide the model's 4 heads, got 3 ranks"),
        (["--page-size", "0"], "page_size must be 1 token or more, got 0"),
    ],
    ids=["fp8_e5m2", "mxfp8", "unknown-option", "other-backend", "heads", "pages"],
)
def test_doctor_finds_faults(checkpoints, options, reason):
    found = doctor(checkpoints(), "--no-self-test", *options)
    assert found["status"] == 1
    assert reason in faults(found)[0]


def test_doctor_sees_that_the_plugin_is_left_out():
    found = doctor(SGLANG_PLUGINS="another")
    assert faults(found) == ["SGLang does not know the name mla_backend"]
