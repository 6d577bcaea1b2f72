"""The real engine on a GPU, with CUDA graphs: tokens of transformers, our kernels in decode and prefill."""

import re
from functools import partial

import pytest
import torch
from draft_checkpoints import eagle_draft, with_mtp_layer
from fp8_oracle import FP8_BFLOAT16_NEAR_TIE, FP8_TOLERANCE, generate_fp8, per_tensor, tile_scaled
from harness import MAX_TOKENS, assert_near_ties_apart, assert_same_answers, prompts, varied_rounds

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# vLLM's mixture-of-experts kernel multiplies float32 in TF32 (10 bits of mantissa), which is not ours to change.
TF32_LOGPROBS = 5e-2
# In bfloat16 transformers itself moves log-probabilities of these checkpoints by up to 0.27 against its float32; where
# the two best logits are closer than that, the next token is a matter of rounding.
assert_near = partial(assert_near_ties_apart, near_tie=0.27)
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


@pytest.mark.parametrize(
    "shape",
    [
        {"arch": "v2"},
        {"arch": "v3", "q_lora_rank": 96},
        {"arch": "v2", "kv_lora_rank": 256, "nope": 64, "v": 64, "rope": 32, "heads": 5, "hidden": 320},
    ],
    ids=["v2", "v3", "a-shape-that-no-prefill-of-vllm-takes"],
)
def test_float32_with_cuda_graphs(engine, checkpoints, oracle, shape):
    folder = checkpoints(**shape)
    run = engine(folder, [prompts(), prompts()], **GRAPHS, enable_prefix_caching=True)
    line = next(line for line in run.log.splitlines() if "mla_backend 0" in line)
    assert "decode triton_splitkv" in line
    assert "prefill triton_ragged" in line
    assert "Capturing CUDA graphs" in run.log
    for answers in run.rounds:
        assert_same_answers(answers, oracle(folder, prompts()), tolerance=TF32_LOGPROBS)
    assert run.rounds[1][-1]["cached"] > 0
    # The second round's few tokens behind cached prefixes attend in latent space: nothing is gathered.
    assert {name.split(":")[1] for name in run.calls} == {"triton_splitkv", "triton_ragged", "triton_write"}


@pytest.mark.parametrize("kernel", ["triton_splitkv", "gluon_sm90"])
def test_bfloat16_differs_only_at_near_ties(engine, checkpoints, oracle, kernel):
    if kernel == "gluon_sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    folder = checkpoints()
    run = engine(folder, [prompts()], dtype="bfloat16", env={"MLA_BACKEND_DECODE": kernel}, **GRAPHS)
    assert f"decode {kernel}" in next(line for line in run.log.splitlines() if "mla_backend 0" in line)
    assert_near(run.rounds[0], oracle(folder, prompts()))


# Head widths as published. MiniCPM3's have no kernel of Hopper's own: its latent is too narrow, its rotary part too.
GLM = {"nope": 192, "v": 256, "heads": 20, "hidden": 320}, ("gluon_sm90", "gluon_sm90_ragged")
MINICPM3 = (
    {"kv_lora_rank": 256, "rope": 32, "nope": 64, "v": 64, "heads": 40, "hidden": 320},
    ("triton_splitkv", "triton_ragged"),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "on_hopper"), [GLM, MINICPM3], ids=["GLM-4.7-Flash", "MiniCPM3"])
def test_other_families(engine, checkpoints, oracle, shape, on_hopper, dtype):
    """DeepSeek-V2 with other families' heads, in captured graphs and behind cached prefixes; without experts, so that
    nothing but attention rounds in its own way."""
    folder = checkpoints(arch="v2", layers=1, **shape)
    run = engine(folder, [prompts(), prompts()], dtype=dtype, enable_prefix_caching=True, **GRAPHS)
    own = dtype == "bfloat16" and torch.cuda.get_device_capability() == (9, 0)
    decode, prefill = on_hopper if own else ("triton_splitkv", "triton_ragged")
    line = next(line for line in run.log.splitlines() if "mla_backend 0" in line)
    assert f"decode {decode}, prefill {prefill}," in line
    assert "Capturing CUDA graphs" in run.log
    for answers in run.rounds:
        if dtype == "bfloat16":
            assert_near(answers, oracle(folder, prompts()))
        else:
            assert_same_answers(answers, oracle(folder, prompts()), tolerance=TF32_LOGPROBS)
    assert run.rounds[1][-1]["cached"] > 0


@pytest.mark.parametrize(("name", "row", "rounded"), [("fp8", 576, per_tensor), ("fp8_ds_mla", 656, tile_scaled)])
def test_fp8_cache_with_cuda_graphs(engine, checkpoints, name, row, rounded):
    """Without experts, whose TF32 would round values of the cache to others."""
    folder = checkpoints(layers=1)
    run = engine(folder, [prompts()], kv_cache_dtype=name, **GRAPHS)
    assert f"{name} cache, {row} bytes a token and layer" in run.log
    wanted = generate_fp8(folder, prompts(), MAX_TOKENS, rounded=rounded)
    assert_same_answers(run.rounds[0], wanted, tolerance=FP8_TOLERANCE)


@pytest.mark.parametrize(("name", "rounded"), [("fp8", per_tensor), ("fp8_ds_mla", tile_scaled)])
@pytest.mark.parametrize("kernel", ["auto", "triton_splitkv"])
def test_fp8_cache_in_bfloat16(engine, checkpoints, kernel, name, rounded):
    """As a server has it, by the kernel that Hopper takes for it and by the portable one."""
    folder = checkpoints(layers=1)
    env = {"MLA_BACKEND_DECODE": kernel}
    run = engine(folder, [prompts()], kv_cache_dtype=name, dtype="bfloat16", env=env, **GRAPHS)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert f"decode {'gluon_sm90' if hopper and kernel == 'auto' else 'triton_splitkv'}" in run.log
    wanted = generate_fp8(folder, prompts(), MAX_TOKENS, rounded=rounded)
    assert_near_ties_apart(run.rounds[0], wanted, near_tie=FP8_BFLOAT16_NEAR_TIE)


def test_tile_scaled_rows_are_those_of_vllms_kernels():
    """Each reads what the other wrote. Bytes are the same where vLLM's scales are powers of two, as they are since its
    pull request 49435; before it wrote the quotients themselves."""
    from vllm import _custom_ops as ops

    from mla_kernels.cache import triton_gather, triton_write

    tokens, device = 200, "cuda"
    rows = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(0))
    rows = (rows * torch.logspace(-4, 3, tokens)[:, None]).bfloat16().to(device)
    rows[7] = 0
    latent, rope = rows[:, :512].contiguous(), rows[:, 512:].contiguous()
    slots = torch.arange(tokens, device=device)
    ours, theirs = (torch.zeros(4, 64, 656, dtype=torch.uint8, device=device) for _ in range(2))
    triton_write.run(latent, rope, ours, slots)
    ops.concat_and_cache_mla(latent, rope, theirs, slots, "fp8_ds_mla", torch.ones(1, device=device))
    table = torch.arange(4, dtype=torch.int32, device=device)[None]
    starts, bounds = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0], [0, tokens]))
    for cache in (ours, theirs):
        read, upconverted = torch.empty_like(rows), torch.empty_like(rows)
        triton_gather.run(cache, table, starts, bounds, read, max_key_len=tokens)
        ops.cp_gather_and_upconvert_fp8_kv_cache(cache, upconverted, table, bounds, 1, starts)
        assert torch.equal(read, upconverted)
        assert (read - rows).abs().max() <= rows.abs().max() / 16
    scales = theirs.flatten(0, 1)[:tokens, 512:528].contiguous().view(torch.float32)
    if (scales.frexp().mantissa == 0.5).all():
        assert torch.equal(ours, theirs)


def test_ngram_speculation_with_cuda_graphs(engine, checkpoints, oracle):
    folder = checkpoints()
    phrase = prompts((9,))[0]
    batch = [phrase * 5, phrase[:4] * 8, *prompts((40,))]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    run = engine(folder, [batch], speculative_config=speculation, max_tokens=24, **GRAPHS)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 24), tolerance=TF32_LOGPROBS)
    assert run.metrics["vllm:spec_decode_num_drafts"] > 0


def test_our_prefill_under_another_decode(engine, checkpoints, oracle):
    """`-ac.mla_prefill_backend CUSTOM` alone: vLLM's own Triton decode, our prefill, context chunks included.

    Without experts: where rounding sends a token to another one, no gap between logits explains the answer.
    """
    folder = checkpoints(layers=1)
    run = engine(
        folder,
        [prompts(), prompts()],
        dtype="bfloat16",
        enable_prefix_caching=True,
        max_num_batched_tokens=128,
        attention_backend=None,
        attention_config={"backend": "TRITON_MLA", "mla_prefill_backend": "CUSTOM"},
    )
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert set(run.calls) == {"prefill:gluon_sm90_ragged" if hopper else "prefill:triton_ragged"}
    for answers in run.rounds:
        assert_near(answers, oracle(folder, prompts()))


OF_THE_MODEL = 64 << 20  # bytes that a step of the small checkpoint takes elsewhere than in attention


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("speculation", [None, "ngram"])
@pytest.mark.parametrize("kernel", ["auto", "triton_splitkv"])
def test_nothing_is_compiled_and_little_allocated_while_serving(engine, checkpoints, kernel, speculation, graphs):
    """Nothing that was not there when the engine was ready: no kernel, no memory that stays, and for a while no more
    than the log says of a step."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    run = engine(
        checkpoints(),
        varied_rounds(64),
        dtype="bfloat16",
        max_num_seqs=64,
        max_num_batched_tokens=256,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        env={"MLA_BACKEND_DECODE": kernel},
        **({"speculative_config": ngram} if speculation else {}),
        **(GRAPHS if graphs else {}),
    )
    assert run.watch["early"] > 0
    assert run.watch["late"] == []
    assert {name.split(":")[0] for name in run.calls} == {"decode", "prefill", "cache_write", "cache_gather"}
    said = float(re.search(r"a step takes up to ([\d.]+) MiB", run.log)[1]) * 2**20
    assert run.watch["peak"] <= said + OF_THE_MODEL
    assert run.watch["kept"] <= 4 << 20


@pytest.mark.parametrize("method", ["mtp", "eagle"])
def test_drafts_with_cuda_graphs(engine, checkpoints, oracle, tmp_path, method):
    """Attention of model and draft by ours, in captured graphs: guesses are taken and change nothing."""
    plain = checkpoints(arch="v3", q_lora_rank=96, layers=1)
    folder = with_mtp_layer(plain, tmp_path / "model") if method == "mtp" else plain
    draft = {"model": str(eagle_draft(plain, tmp_path / "draft"))} if method == "eagle" else {}
    speculation = {"method": method, "num_speculative_tokens": 2, "attention_backend": "CUSTOM", **draft}
    run = engine(folder, [prompts(), prompts()], max_tokens=24, speculative_config=speculation, **GRAPHS)
    for answers in run.rounds:
        assert_same_answers(answers, oracle(plain, prompts(), 24))
    guessed, taken = (run.metrics[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert taken > guessed / 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("ranks", [1, 2], ids=["tp2", "tp2-dcp2"])
def test_two_gpus_answer_as_one(engine, checkpoints, ranks, cache):
    """Several query tokens a request in captured graphs, prompts in pieces, prefix hits; without experts."""
    folder, phrase = checkpoints(layers=1), prompts((9,))[0]
    batch = [phrase * 5, phrase[:4] * 8, *prompts((1, 131, 300))]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options = {"kv_cache_dtype": cache, "speculative_config": speculation, "max_tokens": 24, **GRAPHS}
    options |= {"max_num_batched_tokens": 128, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    one = engine(folder, [batch, batch], **options)
    two = engine(
        folder,
        [batch, batch],
        tensor_parallel_size=2,
        decode_context_parallel_size=ranks,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        **options,
    )
    tolerance = TF32_LOGPROBS if cache == "auto" else FP8_TOLERANCE
    for answers, wanted in zip(two.rounds, one.rounds, strict=True):
        assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in wanted]
        for got, want in zip(answers, wanted, strict=True):
            assert max(abs(a - b) for a, b in zip(got["logprobs"], want["logprobs"], strict=True)) < tolerance
    assert two.rounds[1][-1]["cached"] > 0
    assert two.metrics["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("ranks", [1, 2], ids=["tp2", "tp2-dcp2"])
def test_two_gpus_in_bfloat16(engine, checkpoints, oracle, ranks):
    """As above by the kernels of a model that is served, but without speculation."""
    folder = checkpoints(layers=1)
    run = engine(
        folder,
        [prompts(), prompts()],
        dtype="bfloat16",
        tensor_parallel_size=2,
        decode_context_parallel_size=ranks,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        enable_prefix_caching=True,
        **GRAPHS,
    )
    if torch.cuda.get_device_capability() == (9, 0):
        assert "decode gluon_sm90, prefill gluon_sm90_ragged" in run.log
    for answers in run.rounds:
        assert_near(answers, oracle(folder, prompts()))
    assert run.rounds[1][-1]["cached"] > 0
