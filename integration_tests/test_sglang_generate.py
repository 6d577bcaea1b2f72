"""SGLang's real engine with our backend gives the tokens and log-probabilities of Hugging Face transformers, in
float32."""

import pytest
from fp8_oracle import FP8_TOLERANCE, generate_fp8
from harness import assert_same_answers, prompts, run_sglang

pytest.importorskip("sglang")


@pytest.fixture
def sglang(tmp_path):
    """run(model, rounds, ...) as harness.run_sglang, in a folder of the test."""
    return lambda *args, **kwargs: run_sglang(tmp_path, *args, **kwargs)


def ran(run, *operations, kind="torch"):
    """Exactly these operations ran, each on kernels of this kind."""
    assert {name.split(":")[0] for name in run.calls} == set(operations), run.calls
    assert all(name.split(":")[1].startswith(kind) for name in run.calls), run.calls


@pytest.mark.parametrize(
    "shape",
    [{"arch": "v2"}, {"arch": "v3", "q_lora_rank": 96}],
    ids=["v2", "v3-q_lora"],
)
def test_uneven_batch_and_cached_prefix(sglang, checkpoints, oracle, shape):
    """The second round finds the first one's prompts in the radix cache; few new tokens stay in latent space."""
    folder, batch = checkpoints(**shape), prompts()
    longer = [p + q for p, q in zip(batch, prompts((7,) * len(batch), seed=1), strict=True)]
    run = sglang(folder, [batch, longer])
    assert_same_answers(run.rounds[0], oracle(folder, batch))
    assert_same_answers(run.rounds[1], oracle(folder, longer))
    assert [answer["cached"] for answer in run.rounds[1]] == [len(p) for p in batch]
    ran(run, "decode", "prefill", "cache_write")


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages(sglang, checkpoints, oracle, page_size):
    folder, batch = checkpoints(), prompts((2, 17, 64, 65, 131))
    run = sglang(folder, [batch, batch], page_size=page_size)
    for answers in run.rounds:
        assert_same_answers(answers, oracle(folder, batch))
    assert run.rounds[1][-1]["cached"] >= 64


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_long_new_part_after_a_cached_prefix(sglang, checkpoints, oracle, kernels):
    """Chunked prefill in pieces of 256: too many new tokens for latent space, so their context is gathered and
    expanded."""
    folder, batch = checkpoints(), prompts((600, 270, 33))
    run = sglang(folder, [batch], kernels=kernels, chunked_prefill_size=256, max_tokens=4, page_size=16)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 4))
    ran(run, "decode", "prefill", "cache_write", "cache_gather", kind=kernels)


def test_triton_with_a_cached_prefix(sglang, checkpoints, oracle):
    folder, batch = checkpoints(), prompts((33, 131))
    longer = [p + q for p, q in zip(batch, prompts((20, 3), seed=1), strict=True)]
    run = sglang(folder, [batch, longer], kernels="triton", max_tokens=4)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 4))
    assert_same_answers(run.rounds[1], oracle(folder, longer, 4))
    ran(run, "decode", "prefill", "cache_write", kind="triton")


@pytest.mark.parametrize(("kernels", "page_size"), [("torch", 1), ("triton", 16)])
def test_fp8_cache(sglang, checkpoints, oracle, kernels, page_size):
    """New tokens behind a cached prefix are few enough for latent space, so they too are read from the cache."""
    folder, batch = checkpoints(), prompts((16, 64, 112))
    longer = [p + q for p, q in zip(batch, prompts((7,) * 3, seed=1), strict=True)]
    options = {"kv_cache_dtype": "fp8_e4m3", "kernels": kernels, "page_size": page_size, "max_tokens": 6}
    run = sglang(folder, [batch, longer], **options)
    assert "fp8 cache, 576 bytes a token and layer" in run.log
    assert_same_answers(run.rounds[0], generate_fp8(folder, batch, 6), tolerance=FP8_TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same_answers(run.rounds[0], oracle(folder, batch, 6), tolerance=FP8_TOLERANCE)
    assert [answer["cached"] for answer in run.rounds[1]] == [len(p) for p in batch]
    for prompt, longer_one, answer in zip(batch, longer, run.rounds[1], strict=True):
        wanted = generate_fp8(folder, [longer_one], 6, pieces=(len(prompt),), most_in_latent_space=7)
        assert_same_answers([answer], wanted, tolerance=FP8_TOLERANCE)
    ran(run, "decode", "prefill", "cache_write", kind=kernels)


def test_fp8_cache_gathered_for_a_long_new_part(sglang, checkpoints):
    """Pieces of 256, 256 and 88 tokens: the second expands its context, the third stays in latent space."""
    folder, batch = checkpoints(), prompts((600,))
    run = sglang(folder, [batch], kv_cache_dtype="fp8_e4m3", chunked_prefill_size=256, max_tokens=4, page_size=16)
    wanted = generate_fp8(folder, batch, 4, pieces=(256, 256), most_in_latent_space=88)
    assert_same_answers(run.rounds[0], wanted, tolerance=FP8_TOLERANCE)
    ran(run, "decode", "prefill", "cache_write", "cache_gather")


def test_more_requests_than_the_cache_holds(sglang, checkpoints, oracle):
    """Requests wait or are retracted, and answer as if alone."""
    folder, batch = checkpoints(), prompts((180,) * 6, seed=1)
    run = sglang(folder, [batch], max_tokens=40, max_total_tokens=700, disable_radix_cache=True)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 40))


def test_start_up_line_says_what_runs_and_why(sglang, checkpoints):
    run = sglang(checkpoints(), [prompts((5,))], max_tokens=1)
    (line,) = [line for line in run.log.splitlines() if "mla_backend 0" in line]
    for part in (
        "decode torch_decode, prefill torch_prefill, cache write torch_write",
        "refused triton_splitkv, triton_ragged, triton_write, ",
        "needs a GPU (or TRITON_INTERPRET=1), got cpu",
        "fp32 cache, 2304 bytes a token and layer",
        "4 heads, latent 512 + rope 64, nope 128, v 128",
        "0.0 MiB of scratch for decode",
    ):
        assert part in line


def test_two_tensor_parallel_ranks(sglang, checkpoints, oracle):
    """Each has half of the heads and the whole cache."""
    folder, batch = checkpoints(), prompts((2, 17, 65, 131))
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # SGLang asks for it where ranks outnumber NUMA nodes
    run = sglang(folder, [batch, batch], tp_size=2, env=cores)
    for answers in run.rounds:
        assert_same_answers(answers, oracle(folder, batch))
    said = [line for line in run.log.splitlines() if "mla_backend 0" in line]
    assert len(said) == 2
    assert all("2 heads, latent 512" in line for line in said)


@pytest.mark.parametrize("other", ["prefill", "decode"])
def test_beside_a_backend_of_sglang(sglang, checkpoints, oracle, other):
    """Ours for decode with SGLang's Triton kernels for prefill, and the other way round, cached prefixes too."""
    folder, batch = checkpoints(), prompts((33, 131))
    longer = [p + q for p, q in zip(batch, prompts((20, 3), seed=1), strict=True)]
    backends = {"attention_backend": None, f"{other}_attention_backend": "triton"}
    ours = "decode" if other == "prefill" else "prefill"
    backends[f"{ours}_attention_backend"] = "mla_backend"
    run = sglang(folder, [batch, longer], kernels="triton", max_tokens=4, **backends)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 4))
    assert_same_answers(run.rounds[1], oracle(folder, longer, 4))
    ran(
        run,
        *{"decode": ("decode", "cache_write"), "prefill": ("prefill", "decode", "cache_write")}[ours],
        kind="triton",
    )
