"""vLLM's real engine needs no kernel that was not compiled before it was ready, on a GPU that is not here."""

import pytest
from harness import varied_rounds
from serving_watch import FORGET, STAND_IN

pytest.importorskip("vllm")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("H200", {"dtype": "bfloat16"}),
        ("H200", {"dtype": "bfloat16", "speculative_config": NGRAM}),
        ("H200", {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "block_size": 16}),
        ("A100", {"dtype": "bfloat16", "speculative_config": NGRAM}),
        ("H200", {"dtype": "bfloat16", "invariant_attention": True}),
        ("A100", {"dtype": "bfloat16", "speculative_config": NGRAM, "invariant_attention": True}),
    ],
    ids=["hopper", "hopper-ngram", "fp8", "ampere-ngram", "hopper-invariant", "ampere-ngram-invariant"],
)
def test_nothing_is_compiled_while_serving(engine, checkpoints, device, options):
    run = engine(
        checkpoints(),
        varied_rounds(20),
        max_num_seqs=20,
        max_num_batched_tokens=128,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        env={STAND_IN: device},
        **options,
    )
    assert run.watch["early"] > 0
    assert run.watch["late"] == []
    others = {"prefill", "cache_gather"} if "invariant_attention" not in options else set()
    assert {name.split(":")[0] for name in run.calls} == {"decode", "cache_write", *others}
    assert "calls took every form of the kernels" in run.log


@pytest.mark.parametrize("operation", ["decode", "prefill"])
def test_what_the_warm_up_leaves_out_is_compiled_while_serving(engine, checkpoints, operation):
    """So the test above can fail."""
    run = engine(checkpoints(), varied_rounds(20)[:2], dtype="bfloat16", env={STAND_IN: "H200", FORGET: operation})
    assert any(name.startswith(f"_{operation}_") for name, _ in run.watch["late"])
