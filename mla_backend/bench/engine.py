"""Time decode steps of whole vLLM engines beside each other: `mla-backend bench engine`.

One model, one process a backend, all started before anything is timed and asked in turn, so that no backend has the
GPU at another temperature than the next. The model has the shape of DeepSeek-V2-Lite with few layers and random
weights: good for speed, never for correctness. Prompts are in the prefix cache when steps are timed.
"""

import json
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from dataclasses import dataclass

from mla_backend.bench.machine import BenchmarkError, machine, need_gpu
from mla_backend.config import set_environment, variable

MODEL = {  # deepseek-ai/DeepSeek-V2-Lite's config.json, but for the number of layers
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
STEPS = 129
COLUMNS = ("date", "gpu", "torch", "triton", "vllm", "backend", "layers", "requests", "tokens", "step_ms")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What every engine does.

    model: what its config.json says.  workloads: (requests, prompt tokens of each).
    cache_bytes: of each engine, fixed, so that those beside it change nothing.
    """

    model: dict
    workloads: tuple[tuple[int, int], ...] = ((64, 512), (64, 8192), (8, 32768), (1, 32768))
    cache_bytes: int = 8 << 30


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A backend as vLLM is told of it, and the environment that it runs in."""

    backend: str
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Engine":
        """`CUSTOM`, `FLASHMLA`; `CUSTOM:gluon_sm90` names our decode kernel."""
        backend, _, kernel = text.strip().partition(":")
        return cls(backend=backend, environment=((variable("decode"), kernel),) if kernel else ())

    def __str__(self) -> str:
        return ":".join((self.backend, *(value for _, value in self.environment)))


def start(folder: str, engine: Engine, experiment: Experiment):
    """The engine, with graphs for its batch sizes, and vLLM's version."""
    set_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **dict(engine.environment)})
    import vllm

    requests, tokens = zip(*experiment.workloads, strict=True)
    llm = vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=engine.backend,
        max_model_len=max(tokens) + 8192,
        max_num_seqs=max(requests),
        kv_cache_memory_bytes=experiment.cache_bytes,
        enable_prefix_caching=True,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted(set(requests)),
        },
    )
    return llm, vllm.__version__


def step_ms(llm, requests: int, tokens: int) -> float:
    """Milliseconds of a decode step: median of the later ones of STEPS, timed one by one."""
    import torch
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(tokens)
    prompts = [
        {"prompt_token_ids": torch.randint(1000, (tokens,), generator=generator).tolist()} for _ in range(requests)
    ]
    options = {"ignore_eos": True, "temperature": 0, "detokenize": False}
    llm.generate(prompts, SamplingParams(max_tokens=2, **options), use_tqdm=False)  # fills the prefix cache
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{requests} x {tokens}, {number}", prompt, SamplingParams(max_tokens=STEPS, **options))
    times = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[-STEPS * 3 // 4 : -1])


def serve(connection, folder: str, engine: Engine, experiment: Experiment) -> None:
    """A process's life: build the engine, then answer (requests, tokens) with milliseconds until None comes."""
    try:
        llm, version = start(folder, engine, experiment)
        for requests, tokens in experiment.workloads:
            step_ms(llm, requests, tokens)  # whatever compiles at first use
        connection.send(version)
        while workload := connection.recv():
            connection.send(step_ms(llm, *workload))
    except Exception as error:
        connection.send(BenchmarkError(f"{engine}: {type(error).__name__}: {error!s:.600}"))


def _answer(process, connection, engine: Engine):
    """What a process sends. Raises BenchmarkError, also if it dies."""
    while not connection.poll(1):
        if not process.is_alive() and not connection.poll():
            raise BenchmarkError(f"{engine}: its process ended with status {process.exitcode}; its log is above")
    answer = connection.recv()
    if isinstance(answer, BenchmarkError):
        raise answer
    return answer


def _start_all(folder: str, engines: list[Engine], experiment: Experiment):
    """(process, connection, engine) of each, all on their way at once."""
    context = multiprocessing.get_context("spawn")
    for engine in engines:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, folder, engine, experiment), daemon=True)
        process.start()
        yield process, ours, engine


def run(engines: list[Engine], experiment: Experiment) -> list[dict]:
    """Rows of COLUMNS: every engine of a workload before the next workload.

    Raises BenchmarkError without a GPU and when an engine does not start.
    """
    need_gpu()
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(experiment.model))
        workers = list(_start_all(folder, engines, experiment))
        try:
            versions = [_answer(*worker) for worker in workers]
            rows = []
            for requests, tokens in experiment.workloads:
                for (process, connection, engine), version in zip(workers, versions, strict=True):
                    connection.send((requests, tokens))
                    ms = round(_answer(process, connection, engine), 3)
                    row = {"vllm": version, "backend": str(engine), "layers": experiment.model["num_hidden_layers"]}
                    rows.append(facts | row | {"requests": requests, "tokens": tokens, "step_ms": ms})
                    print(f"{requests} x {tokens} tokens, {engine}: {ms} ms a step", flush=True)
            return rows
        finally:
            for process, _, _ in workers:
                process.terminate()
