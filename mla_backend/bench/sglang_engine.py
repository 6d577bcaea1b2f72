"""SGLang as `bench engine` starts and times it."""

import socket
import time

from mla_backend.bench.engine import PAGE, STEPS, Experiment, StepTimes
from mla_backend.bench.machine import BenchmarkError
from mla_kernels.device import default_place


def start(folder: str, backend: str, experiment: Experiment):
    """The engine, with graphs for its batch sizes, and its name and version."""
    import sglang

    requests, tokens = zip(*experiment.workloads, strict=True)
    with socket.socket() as probe:  # engines beside each other need ports of their own
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = sglang.Engine(
        model_path=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=backend,
        sampling_backend="pytorch",
        grammar_backend="none",
        context_length=max(tokens) + 8192,
        max_running_requests=max(requests),
        max_total_tokens=experiment.cache_tokens,
        mem_fraction_static=0.98,  # no more than those tokens, but SGLang refuses to start where less is free
        chunked_prefill_size=8192,
        log_level="info",
        nccl_port=port,
        device=default_place(),
    )
    return engine, f"SGLang {sglang.__version__}"


def time_step(engine, experiment: Experiment, requests: int, tokens: int) -> StepTimes:
    """Of a decode step: a batch that writes STEPS tokens against one that writes one, over the difference.

    SGLang's graphs are in a process of their own: nothing is said of them.
    Raises BenchmarkError where prompts are not in the radix cache: the difference would hold a prefill.
    """
    prompts = experiment.prompts(requests, tokens)

    def run(count: int) -> tuple[float, int]:
        """Seconds, and how much of every prompt was in the radix cache."""
        begin = time.perf_counter()
        options = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=options)
        return time.perf_counter() - begin, min(answer["meta_info"]["cached_tokens"] for answer in answers)

    run(1)  # fills the cache
    (short, least), (long, less) = run(1), run(STEPS)
    if min(least, less) < tokens - PAGE:
        raise BenchmarkError(f"{requests} x {tokens}: only {min(least, less)} tokens of a prompt were in the cache")
    return StepTimes(1e3 * (long - short) / (STEPS - 1), None)
