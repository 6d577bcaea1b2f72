"""An engine that lives on: other weights in place, adapters, requests that go away while the cache is full."""

import json
import shutil

import pytest
import torch
from harness import assert_same_answers, prompts, run_life
from soak import make_requests

pytest.importorskip("vllm")


def test_weights_are_reloaded_in_place(tmp_path, checkpoints, oracle):
    """The absorbed matrices are those of the new weights, and lie where captured graphs read them.

    Without experts, whose weights vLLM (0.32) reloads to wrong ones on a CPU.
    """
    folder, other, batch = checkpoints(layers=1), checkpoints(layers=1, seed=1), prompts((2, 65, 131))
    run = run_life(tmp_path, folder, "reload", prompts=batch, other=str(other))
    for answers, weights in zip(run["answers"], (folder, other, folder), strict=True):
        assert_same_answers(answers, oracle(weights, batch))
    assert len(run["addresses"][0]) == 2, "one layer of two matrices"
    assert run["addresses"][1] == run["addresses"][2] == run["addresses"][0]


@pytest.mark.parametrize("connector", ["OffloadingConnector", "ExampleConnector"])
def test_pages_leave_the_engine_and_come_back(tmp_path, checkpoints, oracle, connector):
    """vLLM's offloading to host memory, with the copies of offload_stand_in.py, and a connector that writes files: they
    take pages out of our cache and put them back."""
    folder, batch = checkpoints(), prompts((70, 131))
    options = {"cpu_bytes_to_use": 64 << 20, "shared_storage_path": str(tmp_path / "pages")}
    transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": options}
    run = run_life(tmp_path, folder, "offload", prompts=batch, llm={"kv_transfer_config": transfer})
    for answers in run["answers"]:
        assert_same_answers(answers, oracle(folder, batch))
    assert [answer["cached"] for answer in run["answers"][1]] == [64, 128]
    assert run["metrics"]["vllm:external_prefix_cache_hits"] == 64 + 128


ADAPTED = ("q_proj", "kv_a_proj_with_mqa", "o_proj")


def adapter(folder, weights, modules):
    """A LoRA adapter of rank 4 as PEFT saves it, for these projections of every layer. Returns what it adds to each
    weight."""
    from safetensors.torch import save_file

    generator, pairs, added = torch.Generator().manual_seed(0), {}, {}
    for name, weight in weights.items():
        if name.split(".")[-2] in modules:
            down = torch.randn(4, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            up = torch.randn(weight.shape[0], 4, generator=generator) * 0.5
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            added[name] = up @ down
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def test_adapters(tmp_path, checkpoints, oracle):
    """Requests with an adapter answer as its merged weights do, the others in their batch as the model alone. One for
    the projection that decode has absorbed is refused: vLLM would leave it out and say nothing.

    Without experts, for which vLLM has no adapters on a CPU.
    """
    from safetensors.torch import load_file, save_file

    folder, batch = checkpoints(layers=1), prompts((2, 65, 17, 131))
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    added = adapter(tmp_path / "small", weights, ADAPTED)
    adapter(tmp_path / "wrong", weights, ("kv_b_proj",))
    merged = tmp_path / "merged"
    shutil.copytree(folder, merged)
    save_file({n: w.float() + added.get(n, 0) for n, w in weights.items()}, merged / path.name, {"format": "pt"})
    places = {"folder": str(tmp_path / "small"), "wrong": str(tmp_path / "wrong")}
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    run = run_life(tmp_path, folder, "adapters", prompts=batch, llm=options, **places)
    expected = [oracle(merged if i % 2 else folder, [prompt])[0] for i, prompt in enumerate(batch)]
    assert_same_answers(run["answers"], expected)
    assert oracle(merged, batch[1:2]) != oracle(folder, batch[1:2])
    assert "mla_backend cannot serve an adapter for kv_b_proj" in run["refusal"]


def test_soak(tmp_path, checkpoints, oracle):
    """Sixty requests for a small cache in batch-invariant attention: some are preempted, each tenth goes away, pages
    come back, and answers are those of the same requests alone, and transformers'."""
    folder, lengths = checkpoints(), {"longest": 200, "answer": 32}
    run = run_life(
        tmp_path,
        folder,
        "soak",
        invariant_attention=True,
        llm={
            "block_size": 16,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 288 * 2 * 2304,
            "max_num_batched_tokens": 64,
        },
        count=60,
        at_once=12,
        alone=15,
        **lengths,
    )
    assert {name.split(":")[0] for name in run["calls"]} == {"decode", "cache_write"}, "prefill goes through decode"
    assert run["left"] == 6
    assert len(run["alone"]) >= 15
    requests = make_requests(60, **lengths)
    for number, got in run["answers"].items():
        asked = requests[int(number)]
        assert_same_answers([got], oracle(folder, [asked.prompt], asked.max_tokens))
        # In float32 the rest of the model rounds by batch.
        assert got["tokens"] == run["alone"][number]["tokens"]
    assert run["metrics"]["vllm:prefix_cache_hits"] > 0
    assert run["metrics"]["vllm:num_preemptions"] > 0
    assert run["leaked"] == 0
    assert not run["moved"]
