"""vLLM as `bench engine` starts and times it."""

import time

from mla_backend.bench.engine import STEPS, Experiment, StepTimes
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.timing import replay_ms
from mla_backend.config import set_environment


def start(folder: str, backend: str, experiment: Experiment):
    """The engine, with graphs for its batch sizes, and its name and version."""
    set_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    import vllm

    requests, tokens = zip(*experiment.workloads, strict=True)
    llm = vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_model_len=max(tokens) + 8192,
        max_num_seqs=max(requests),
        kv_cache_memory_bytes=experiment.cache_bytes,
        # Says nothing beside those bytes, but vLLM refuses to start where less than this share of memory is free.
        gpu_memory_utilization=0.02,
        enable_prefix_caching=True,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted(set(requests)),
        },
    )
    return llm, f"vLLM {vllm.__version__}"


def time_step(llm, experiment: Experiment, requests: int, tokens: int) -> StepTimes:
    """Of a decode step, the time of the later ones of STEPS, together, over their number.

    Together, because vLLM schedules ahead: one call may return early and the next wait for both. The graph is replayed
    between two earlier ones: it computes the same step again, and writes the same rows to the same places.
    Raises BenchmarkError if not all requests ran together.
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in experiment.prompts(requests, tokens)]
    options = {"ignore_eos": True, "temperature": 0, "detokenize": False}
    llm.generate(prompts, SamplingParams(max_tokens=2, **options), use_tqdm=False)  # fills the prefix cache
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{requests} x {tokens}, {number}", prompt, SamplingParams(max_tokens=STEPS, **options))
    times, answers, graph_ms = [], [], None
    while engine.has_unfinished_requests():
        if sum(answers[-8:]) == 8 * requests and len(answers) < STEPS // 4 and graph_ms is None:
            graph_ms = _graph_ms(engine, requests)
        answers.append(len(engine.step()))
        times.append(time.perf_counter())
    first, last = -STEPS * 3 // 4, -2
    steps = sum(answers[first + 1 : last + 1]) / requests
    if max(answers) != requests or steps < 0.9 * (last - first):
        raise BenchmarkError(f"{requests} requests were to run together, but {steps:g} of {last - first} steps had all")
    return StepTimes(1e3 * (times[last] - times[first]) / steps, graph_ms)


def _graph_ms(engine, requests: int) -> float | None:
    """Of the captured graph of a step of so many requests, with the inputs of the last one; None without one where
    vLLM 0.26 to 0.33 keep theirs."""
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    graphs = [graph for step, graph in manager.graphs.items() if step.num_tokens == requests] if manager else []
    return replay_ms(graphs[0]) if graphs else None
