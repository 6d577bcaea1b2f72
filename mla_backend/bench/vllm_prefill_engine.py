"""vLLM as prefill_steps.py starts and times it."""

from functools import partial

import torch

from mla_backend.bench import compare
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.peers import PrefillInputs
from mla_backend.bench.prefill import effort_of, expected
from mla_backend.bench.prefill_steps import Experiment, StepCost
from mla_backend.bench.timing import call_us, graph_us, peak_bytes
from mla_backend.config import set_environment
from mla_backend.memory import CONTEXT_ROWS


def start(folder: str, backend: str, experiment: Experiment):
    """The engine, and its name and version.   backend: vLLM's names of one for decode and one for prefill, as `A+B`."""
    set_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    import vllm

    decode, prefill = backend.split("+")
    llm = vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_config={"backend": decode, "mla_prefill_backend": prefill},
        max_model_len=experiment.longest + 64,
        max_num_seqs=4,
        max_num_batched_tokens=max(new for new, _ in experiment.workloads) + 64,
        kv_cache_memory_bytes=experiment.cache_bytes,
        gpu_memory_utilization=0.02,  # vllm_engine.py says why
        enable_prefix_caching=True,
        enforce_eager=True,
    )
    llm.asked = 0
    return llm, f"vLLM {vllm.__version__}"


def time_step(llm, experiment: Experiment, tokens: int, context: int) -> StepCost:
    """Of a layer's `forward_mha` for a request of so many new tokens behind so many cached ones, after its answer has
    agreed with float32 attention.

    Raises BenchmarkError for a wrong answer, and if vLLM made no such step.
    """
    llm.asked += 1
    generator = torch.Generator().manual_seed(llm.asked)
    vocabulary = experiment.model["vocab_size"]
    prompt = torch.randint(vocabulary // 2, (context + tokens,), generator=generator).tolist()
    if context:
        _generate(llm, prompt[:context])
    (layer,) = _layers(llm)
    seen, clock = [], call_us if experiment.eager else graph_us
    layer.impl.forward_mha = partial(_watched, layer.impl.forward_mha, layer.impl, tokens, context, seen, clock)
    try:
        cached = _generate(llm, prompt)
    finally:
        del layer.impl.forward_mha  # the method of its class is there again
    if len(seen) != 1 or cached != context:
        raise BenchmarkError(
            f"vLLM was to send {tokens} new tokens behind {context} cached ones to forward_mha once, and did so "
            f"{len(seen)} times with {cached} cached"
        )
    return seen[0]


def _generate(llm, prompt: list[int]) -> int:
    """Answer with one token. Returns how many of the prompt's were cached."""
    from vllm import SamplingParams

    options = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], options, use_tqdm=False)
    return answer.num_cached_tokens


def _layers(llm) -> list:
    """The attention layers of its model."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    modules = worker.get_model().modules()
    return [module for module in modules if hasattr(getattr(module, "impl", None), "forward_mha")]


def _watched(
    forward_mha, impl, tokens: int, context: int, seen: list, clock,
    q, latent, rope, cache, metadata, *more, output, output_scale=None,
):  # fmt: skip
    """Do what the layer wants; in the step that is looked for, check and time it, too."""
    call = partial(forward_mha, q, latent, rope, cache, metadata, *more, output=output, output_scale=output_scale)
    call()
    if len(q) == tokens:
        _check(output, impl, q, latent, rope, cache, metadata.prefill.block_table[0], context)
        allocated = peak_bytes(call)
        seen.append(StepCost(clock([call], **effort_of(clock([call], at_least=1, replays=1))), allocated))


def _inputs(impl, q_TNQ, latent_TL, rope_T1R, cache_AGK, pages_M, context: int) -> PrefillInputs:
    """Cached and new tokens of the only request over expanded heads."""
    used = -(-context // cache_AGK.shape[1])
    cached_SK = cache_AGK[pages_M[:used].long()].flatten(0, 1)[:context].to(q_TNQ.dtype)
    widths = impl.kv_lora_rank, impl.qk_rope_head_dim
    latent_SL, rope_SR = (
        torch.cat(pair) for pair in zip(cached_SK.split(widths, -1), (latent_TL, rope_T1R.flatten(1)), strict=True)
    )
    kv_SNX = _expanded(impl, latent_SL)
    k_nope_SNP, v_SNV = kv_SNX.split([impl.qk_nope_head_dim, impl.v_head_dim], -1)

    def starts(tokens: int):
        return torch.tensor([0, tokens], dtype=torch.int32, device=q_TNQ.device)

    return PrefillInputs(
        q_TNQ=q_TNQ,
        k_nope_SNP=k_nope_SNP,
        k_rope_SNR=rope_SR[:, None].expand(-1, impl.num_heads, -1),
        v_SNV=v_SNV,
        query_start_B1=starts(len(q_TNQ)),
        key_start_B1=starts(len(v_SNV)),
        max_query_len=len(q_TNQ),
        max_key_len=len(v_SNV),
        causal=True,
        scale=impl.scale,
    )


def _expanded(impl, latent_SL) -> torch.Tensor:
    """Its up-projection, some rows at a time: those of all have more elements than 32 bits count."""
    width = impl.qk_nope_head_dim + impl.v_head_dim
    kv_SNX = latent_SL.new_empty(len(latent_SL), impl.num_heads, width)
    for into, latent in zip(kv_SNX.split(CONTEXT_ROWS), latent_SL.split(CONTEXT_ROWS), strict=True):
        into.copy_(impl.kv_b_proj(latent)[0].view(into.shape))
    return kv_SNX


def _check(output, *step) -> None:
    """Compare with float32 attention. Gives back the memory that this took: other engines share the GPU."""
    data = _inputs(*step)
    row_M, out_MNV, *_ = expected(data)
    error = compare.peer_error(output.view(len(data.q_TNQ), *out_MNV.shape[1:]), out_MNV, row_M)
    del data
    torch.cuda.empty_cache()
    if not error <= compare.PEER_ERROR:  # NaN too
        raise BenchmarkError(f"forward_mha is off by {error:.1e} of the norm of float32 attention")
