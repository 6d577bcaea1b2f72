"""vLLM's real engine with our backend gives the tokens and log-probabilities of Hugging Face transformers, in
float32."""

import pytest
from harness import assert_same_answers, changed, prompts

pytest.importorskip("vllm")


def ran(run, *operations, kind="torch"):
    """Each operation ran on a kernel of this kind, and none on another."""
    for operation in operations:
        names = [name for name in run.calls if name.startswith(f"{operation}:")]
        assert names, f"{operation} did not run: {run.calls}"
        assert all(name.startswith(f"{operation}:{kind}") for name in names), run.calls


@pytest.mark.parametrize(
    "shape",
    [
        {"arch": "v2"},
        {"arch": "v2", "q_lora_rank": 96},
        {"arch": "v3", "q_lora_rank": 96},
        {"arch": "v2", "kv_lora_rank": 256, "nope": 64, "v": 64, "rope": 32, "heads": 5, "hidden": 320},
    ],
    ids=["v2", "v2-q_lora", "v3-q_lora", "latent-256-rope-32-heads-5"],
)
def test_uneven_batch(engine, checkpoints, oracle, shape):
    folder = checkpoints(**shape)
    run = engine(folder, [prompts()])
    assert_same_answers(run.rounds[0], oracle(folder, prompts()))
    ran(run, "decode", "prefill", "cache_write")


@pytest.mark.parametrize("custom_ops", [[], ["none"]], ids=["default", "none"])
def test_plain_rotary_embedding(engine, checkpoints, oracle, tmp_path, custom_ops):
    """Rotary embedding without YaRN goes through an op that vLLM's CPU build gets wrong, unless it is switched off."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    folder = changed(checkpoints(), tmp_path, rope_parameters=plain)
    run = engine(folder, [prompts((2, 33, 131))], compilation_config={"custom_ops": custom_ops})
    assert_same_answers(run.rounds[0], oracle(folder, prompts((2, 33, 131))))


def test_start_up_line_says_what_runs_and_why(engine, checkpoints):
    run = engine(checkpoints(), [prompts((5,))], max_tokens=1)
    line = next(line for line in run.log.splitlines() if "mla_backend 0" in line)
    for part in (
        "decode torch_decode, prefill torch_prefill, cache write torch_write",
        "refused triton_splitkv, triton_ragged, triton_write, ",
        "needs a GPU (or TRITON_INTERPRET=1), got cpu",
        "fp32 cache, 2304 bytes a token and layer",
        "4 heads, latent 512 + rope 64, nope 128, v 128",
        "0.0 MiB of scratch for decode",
    ):
        assert part in line
    assert run.log.count("mla_backend 0") == 1, "said once, not for every layer"


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_chunked_prefill_and_prefix_cache(engine, checkpoints, oracle, kernels):
    """A prompt prefilled in pieces reads its own cached context; the same prompt again reads cached pages. Pieces of
    152 tokens behind as many are expanded, behind more they and shorter ones attend in latent space."""
    folder = checkpoints()
    batch = prompts((304, 33, 2) if kernels == "triton" else (500, 129, 33, 2))
    run = engine(
        folder,
        [batch, batch],
        kernels=kernels,
        max_num_batched_tokens=152,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=16,
    )
    expected = oracle(folder, batch)
    assert_same_answers(run.rounds[0], expected)
    assert_same_answers(run.rounds[1], expected)
    assert run.rounds[1][0]["cached"] >= 64, "the second round was to hit the prefix cache"
    ran(run, "decode", "prefill", "cache_write", "cache_gather", kind=kernels)


def test_our_prefill_under_vllms_layer(engine, checkpoints, oracle):
    """vLLM expands, concatenates, cuts context into chunks and merges; prompts of every length beside requests that are
    decoded, in pieces and behind cached prefixes, in a model length of 262144."""
    folder = checkpoints()
    batch = prompts((5, 300, 40, 129))
    run = engine(
        folder,
        [batch[:1] * 3 + batch, batch],
        prefill_alone=True,
        max_model_len=262144,
        hf_overrides={"max_position_embeddings": 262144},
        kv_cache_memory_bytes=262144 * 2304 * 2 + (16 << 20),
        max_num_batched_tokens=120,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=16,
    )
    for answers, asked in zip(run.rounds, [batch[:1] * 3 + batch, batch], strict=True):
        assert_same_answers(answers, oracle(folder, asked))
    assert run.rounds[1][1]["cached"] > 200
    assert set(run.calls) == {"cache_write:torch_write", "decode:torch_decode", "prefill:torch_prefill"}


def test_short_turns_on_a_long_cached_prefix(engine, checkpoints, oracle):
    """A long prompt, then turns of a conversation about it: chat, a tool's result, two at once beside a new prompt.
    Nothing cached is gathered or expanded."""
    folder = checkpoints()
    (document,), (hello, tool, again, new) = prompts((850,)), prompts((20, 100, 3, 40), seed=1)
    turns = [document + hello, document + hello + tool]
    rounds = [[document], turns[:1], [turns[1] + again], [document + again, new, turns[1] + hello]]
    run = engine(folder, rounds, enable_prefix_caching=True, block_size=16, max_num_batched_tokens=1024)
    for answers, asked in zip(run.rounds, rounds, strict=True):
        assert_same_answers(answers, oracle(folder, asked))
    assert [answers[0]["cached"] for answers in run.rounds] == [0, 848, 864, 848]
    assert run.rounds[3][2]["cached"] >= 960
    ran(run, "decode", "cache_write")
    layers, expanded = 2, 2  # the long prompt, and the new one with what comes beside it
    assert run.calls["prefill:torch_prefill"] == layers * expanded
    assert not any(name.startswith("cache_gather") for name in run.calls), run.calls


def test_context_of_several_chunks(engine, checkpoints, oracle):
    """More cached context in one step than half of vLLM's workspace (eight requests of full length) holds at once."""
    folder = checkpoints()
    context = prompts((129,) * 10)
    longer = [p + q for p, q in zip(context, prompts((150,) * 10, seed=1), strict=True)]
    run = engine(
        folder,
        [context, longer],
        max_tokens=2,
        max_model_len=288,
        max_num_seqs=10,
        max_num_batched_tokens=2048,
        block_size=16,
        enable_prefix_caching=True,
    )
    assert_same_answers(run.rounds[1], oracle(folder, longer, 2))
    assert all(answer["cached"] == 128 for answer in run.rounds[1])
    layers, chunks = 2, 2
    assert run.calls["cache_gather:torch_gather"] == layers * chunks


def test_ngram_speculation(engine, checkpoints, oracle):
    """Several query tokens a request, of uneven number, go to decode."""
    folder = checkpoints()
    phrase = prompts((9,))[0]
    batch = [phrase * 5, phrase[:4] * 8, *prompts((40,))]
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    run = engine(folder, [batch], speculative_config=speculation, max_tokens=24)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 24))
    assert run.metrics["vllm:spec_decode_num_drafts"] > 0
    ran(run, "decode", "prefill", "cache_write")


def test_backend_per_kind(engine, checkpoints, oracle):
    folder = checkpoints()
    run = engine(
        folder,
        [prompts((20,))],
        attention_backend=None,
        attention_config={"backend_per_kind": {"mla_attention": "CUSTOM"}},
    )
    assert_same_answers(run.rounds[0], oracle(folder, prompts((20,))))
    ran(run, "decode", "prefill", "cache_write")


def test_preemption_when_the_cache_is_full(engine, checkpoints, oracle):
    """Requests that do not fit together are preempted and resumed, and answer as if alone."""
    folder = checkpoints()
    batch = prompts((60,) * 6)
    tokens_in_cache = 256
    run = engine(
        folder,
        [batch],
        max_tokens=24,
        max_model_len=128,
        block_size=16,
        kv_cache_memory_bytes=tokens_in_cache * 2304 * 2,
    )
    assert_same_answers(run.rounds[0], oracle(folder, batch, 24))
    assert run.metrics["vllm:num_preemptions"] > 0
