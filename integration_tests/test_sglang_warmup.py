"""SGLang's real engine needs no kernel that was not compiled before it was ready, on a GPU that is
not here, and on one that is."""

import pytest
import torch
from harness import run_sglang, varied_rounds
from serving_watch import FORGET, STAND_IN
from sglang_runner import OPS_OF_THE_MODE

pytest.importorskip("sglang")

DETERMINISTIC = {"enable_deterministic_inference": True}


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("H200", {}),
        ("H200", {"page_size": 64}),
        ("A100", {"page_size": 16, "kv_cache_dtype": "fp8_e4m3"}),
        ("H200", DETERMINISTIC),
        ("A100", {"page_size": 16, **DETERMINISTIC}),
    ],
    ids=["hopper", "hopper-pages", "ampere-fp8", "hopper-deterministic", "ampere-deterministic"],
)
def test_nothing_is_compiled_while_serving(tmp_path, checkpoints, device, options):
    options = {"dtype": "bfloat16", "chunked_prefill_size": 256, **options}
    env = {STAND_IN: device, OPS_OF_THE_MODE: "0"}
    run = run_sglang(tmp_path, checkpoints(), varied_rounds(8), env=env, **options)
    assert run.watch["early"] > 0
    assert run.watch["late"] == []
    others = {"prefill"} if "enable_deterministic_inference" not in options else set()
    assert {name.split(":")[0] for name in run.calls} >= {"decode", "cache_write", *others}
    assert "calls took every form of the kernels" in run.log


def test_what_the_warm_up_leaves_out_is_compiled_while_serving(tmp_path, checkpoints):
    """So the test above can fail."""
    env = {STAND_IN: "H200", FORGET: "decode"}
    run = run_sglang(tmp_path, checkpoints(), varied_rounds(8)[:2], env=env, dtype="bfloat16")
    assert any(name.startswith("_decode_") for name, _ in run.watch["late"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("page_size", [1, 64])
def test_nothing_is_compiled_while_serving_on_a_gpu(tmp_path, checkpoints, page_size):
    """With CUDA graphs of decode, and prefills between the pieces of others."""
    options = {"dtype": "bfloat16", "page_size": page_size, "max_running_requests": 64, "max_total_tokens": 65536}
    run = run_sglang(tmp_path, checkpoints(), varied_rounds(64), **options)
    assert run.watch["early"] > 0
    assert run.watch["late"] == []
