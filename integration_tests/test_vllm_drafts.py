"""vLLM's real engine with MTP and EAGLE, attention of model and draft by ours: tokens of transformers, and guesses that
are taken."""

import pytest
from draft_checkpoints import eagle_draft, with_mtp_layer
from harness import assert_same_answers, prompts

pytest.importorskip("vllm")


@pytest.mark.parametrize("method", ["mtp", "eagle"])
def test_guesses_change_nothing_and_are_taken(engine, checkpoints, oracle, tmp_path, method):
    """Prompts in pieces, which the draft sees too; prefixes from the cache; three query tokens a request. That the
    draft's attention is right shows in how many guesses are taken: each is right if it is."""
    plain = checkpoints(arch="v3", q_lora_rank=96, layers=1)
    folder = with_mtp_layer(plain, tmp_path / "model") if method == "mtp" else plain
    draft = {"model": str(eagle_draft(plain, tmp_path / "draft"))} if method == "eagle" else {}
    batch = [prompts((9,))[0] * 5, *prompts((1, 40, 131))]
    run = engine(
        folder,
        [batch, batch],
        max_tokens=20,
        block_size=16,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        speculative_config={"method": method, "num_speculative_tokens": 2, "attention_backend": "CUSTOM", **draft},
    )
    for answers in run.rounds:
        assert_same_answers(answers, oracle(plain, batch, 20))
    assert run.rounds[1][-1]["cached"] == 112
    guessed, taken = (run.metrics[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert taken > guessed / 2
    assert {name.split(":")[0] for name in run.calls} == {"decode", "prefill", "cache_write"}
