"""What of an engine's life a CPU cannot show: sleep, offloading to host memory, quantised projections, compilation,
both model runners."""

import pytest
import torch
from harness import assert_same_answers, prompts, run_life
from quantised_checkpoint import quantise
from test_vllm_gpu import GRAPHS, TF32_LOGPROBS, assert_near

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BATCH = prompts((2, 65, 131, 450))


@pytest.mark.parametrize("kernel", ["triton_splitkv", "gluon_sm90"])
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(tmp_path, checkpoints, level, kernel):
    """Captured graphs, scratch and absorbed matrices after memory was given back and taken again; level 2 forgets the
    weights, which are then loaded in place. The same bits before and after, request by request.

    Without experts, whose weights vLLM (0.32) reloads to wrong ones on a CPU.
    """
    if kernel == "gluon_sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    options = {"dtype": "bfloat16", "enable_sleep_mode": True, **GRAPHS}
    env = {"MLA_BACKEND_DECODE": kernel}
    run = run_life(tmp_path, checkpoints(layers=1), "sleep", prompts=BATCH, level=level, llm=options, env=env)
    before, after = run["answers"]
    assert after == before
    assert run["addresses"][0] == run["addresses"][1]
    assert run["freed"] > 60 << 20, "the cache of 64 MiB is gone"


def test_reload_under_captured_graphs(tmp_path, checkpoints, oracle):
    folder, other = checkpoints(layers=1), checkpoints(layers=1, seed=1)
    run = run_life(tmp_path, folder, "reload", prompts=BATCH, other=str(other), llm=GRAPHS)
    for answers, weights in zip(run["answers"], (folder, other, folder), strict=True):
        assert_same_answers(answers, oracle(weights, BATCH), tolerance=TF32_LOGPROBS)
    assert run["addresses"][1] == run["addresses"][2] == run["addresses"][0]


def test_offloading_to_host_memory(tmp_path, checkpoints, oracle):
    folder = checkpoints()
    connector = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 256 << 20},
    }
    run = run_life(tmp_path, folder, "offload", prompts=BATCH, llm={"kv_transfer_config": connector, **GRAPHS})
    for answers in run["answers"]:
        assert_same_answers(answers, oracle(folder, BATCH), tolerance=TF32_LOGPROBS)
    assert run["answers"][1][-1]["cached"] == 448, "nothing of it was left in the engine's own cache"


def test_quantised_projection(tmp_path, engine, checkpoints, oracle):
    """kv_b_proj in fp8 with a scale for each block, as DeepSeek-V3's checkpoints have it: decode's absorbed matrices
    and prefill's projection are of the same weights. Without experts, which rounding sends tokens to others of."""
    quantised, plain = quantise(checkpoints(layers=1), tmp_path)
    run = engine(quantised, [BATCH], dtype="bfloat16", **GRAPHS)
    assert_near(run.rounds[0], oracle(plain, BATCH))


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])
def test_model_runners_and_compilation(engine, checkpoints, oracle, runner):
    """vLLM's default, compiled and with all its graphs, under either model runner."""
    run = engine(
        checkpoints(),
        [BATCH, BATCH],
        dtype="bfloat16",
        enforce_eager=False,
        enable_prefix_caching=True,
        env={"VLLM_USE_V2_MODEL_RUNNER": runner, "TORCHDYNAMO_DISABLE": "0"},
    )
    for answers in run.rounds:
        assert_near(answers, oracle(checkpoints(), BATCH))
    assert run.rounds[1][-1]["cached"] > 0


@pytest.mark.parametrize("kernel", ["triton_splitkv", "gluon_sm90"])
def test_soak(tmp_path, checkpoints, kernel):
    """2000 requests, a tenth of which go away, in vLLM's batch-invariant mode with captured graphs: no error, no memory
    and no page lost."""
    run = soak(tmp_path, checkpoints(heads=16, layers=4, hidden=1024), kernel, count=2000)
    assert run["left"] == 200
    assert len(run["alone"]) >= 100
    assert {number: len(one["tokens"]) for number, one in run["answers"].items()} == {
        number: len(one["tokens"]) for number, one in run["alone"].items()
    }
    assert run["metrics"]["vllm:prefix_cache_hits"] > 0
    assert run["leaked"] == 0
    assert run["held"][1] - run["held"][0] <= 4 << 20
    assert not run["moved"]


# vLLM 0.26's own kernel for a norm behind a residual takes 1024 threads a token in steps of less than 256 tokens, and
# 256 in others, in its batch-invariant mode too: so it adds squares in another order. PyTorch's norm does not.
NORMS_OF_PYTORCH = {
    "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
    "compilation_config": GRAPHS["compilation_config"] | {"custom_ops": ["-rms_norm"]},
}


@pytest.mark.parametrize("kernel", ["triton_splitkv", "gluon_sm90"])
@pytest.mark.parametrize("layers", [1, 2], ids=["dense", "experts"])
def test_bits_of_a_request_alone(tmp_path, checkpoints, layers, kernel):
    model = checkpoints(heads=16, layers=layers, hidden=1024)
    run = soak(tmp_path, model, kernel, count=200, **NORMS_OF_PYTORCH)
    for number, answer in run["answers"].items():
        alone = run["alone"][number]
        assert (answer["tokens"], answer["logprobs"]) == (alone["tokens"], alone["logprobs"]), number


def soak(tmp_path, model, kernel: str, count: int, **more) -> dict:
    if kernel == "gluon_sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    options = {
        "dtype": "bfloat16",
        "max_model_len": 4224,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 256 << 20,  # of 4 layers 58,000 tokens: fewer than 64 of the longest have
        **GRAPHS,
        **more,
    }
    env = {"VLLM_BATCH_INVARIANT": "1", "MLA_BACKEND_DECODE": kernel}
    load = {"count": count, "longest": 4000, "answer": 128, "at_once": 128, "alone": 100}
    return run_life(tmp_path, model, "soak", env=env, llm=options, **load)
