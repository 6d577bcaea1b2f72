"""Run vLLM's own engine once, in a process of its own, and write what it did.

    python engine_runner.py SPEC.json RESULT.json

SPEC: {"llm": keyword arguments of vllm.LLM, "rounds": [[prompt token ids, ...], ...], "max_tokens": n}, and perhaps
"invariant_attention", "prefill_alone" or "kimi" (kimi_stand_in.py): true. Rounds run one after another on the same
engine. RESULT: for each round and prompt the new tokens, their log-probabilities and how many prompt tokens came from
the prefix cache; how often each of our kernels was called; vLLM's counters; what serving_watch.py saw.
"""

import json
import os
import pathlib
import sys

import kimi_stand_in
from serving_watch import Watch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: its counters can be read, it starts faster
os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # router helpers of vLLM compile themselves, which takes longer than they do


OPTIONS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "attention_backend": "CUSTOM",
    "disable_log_stats": False,
    "seed": 0,
    # Else vLLM takes nine tenths of the memory, and engines could not run beside each other. The share says nothing
    # beside those bytes, but vLLM refuses to start where less is free.
    "kv_cache_memory_bytes": 64 << 20,
    "gpu_memory_utilization": 0.02,
}


def main(spec_path: str, result_path: str) -> None:
    from vllm import LLM, SamplingParams

    spec, watch = json.loads(pathlib.Path(spec_path).read_text()), Watch()
    if os.environ.get("TRITON_INTERPRET") == "1":
        quicken_the_interpreter()
    watch.follow()
    if spec.get("invariant_attention"):
        tell_our_adapter_alone()
    if spec.get("kimi"):
        kimi_stand_in.stand_in()
    options = OPTIONS
    if spec.get("prefill_alone"):
        options = OPTIONS | {"attention_backend": None, "attention_config": _let_vllm_do_all_but_prefill()}
    llm = LLM(**{**options, **spec["llm"]})
    watch.ready()
    sampling = SamplingParams(temperature=0, max_tokens=spec["max_tokens"], ignore_eos=True, logprobs=1)
    rounds = []
    for prompts in spec["rounds"]:
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        rounds.append([answered(a) for a in answers])
    result = {"rounds": rounds, "calls": calls(), "metrics": counters(llm), "watch": watch.seen()}
    pathlib.Path(result_path).write_text(json.dumps(result))


def quicken_the_interpreter() -> None:
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "kernels" / "tests"))
    from quick_interpreter import make_quick

    make_quick()


def tell_our_adapter_alone() -> None:
    """Let our adapter see VLLM_BATCH_INVARIANT=1 and nobody else: on a CPU vLLM has no experts and no matrix products
    for that mode, and does not start."""
    from types import SimpleNamespace

    from mla_backend.vllm_adapter import backend, metadata, prefill

    for module in (backend, metadata, prefill):
        module.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=True)


def _let_vllm_do_all_but_prefill() -> dict:
    """`-ac.mla_prefill_backend CUSTOM` under vLLM's own layer, for a CPU, where vLLM has one prefill backend and asks
    nobody: make that one ours. Decode is ours, too, as vLLM's on a CPU caches no prefix; it leaves prefill to vLLM."""
    from vllm.platforms import current_platform

    from mla_backend.vllm_adapter.prefill import MLAPrefill

    type(current_platform).get_mla_prefill_backend_cls = classmethod(lambda cls, config: MLAPrefill)
    return {"backend": "CUSTOM", "mla_prefill_backend": "FLASH_ATTN"}


def answered(answer) -> dict:
    chosen = answer.outputs[0]
    return {
        "tokens": list(chosen.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(chosen.logprobs, chosen.token_ids, strict=True)],
        "cached": answer.num_cached_tokens,
    }


def calls() -> dict[str, int]:
    if "mla_backend.attention" not in sys.modules:
        return {}
    from mla_backend.attention import CALLS

    return {f"{operation}:{kernel}": count for (operation, kernel), count in CALLS.items()}


def counters(llm) -> dict[str, float]:
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


if __name__ == "__main__":
    main(*sys.argv[1:])
