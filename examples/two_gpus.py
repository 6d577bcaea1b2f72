"""Two ranks in vLLM, attention by mla_backend: on two GPUs, or as two processes on a CPU.

    python examples/two_gpus.py                      tensor parallelism: each rank has half of the heads
    python examples/two_gpus.py --share-cache        and decode context parallelism: half of every request's cache, too
    python examples/two_gpus.py MODEL --share-cache  another model than the tiny one that is made in models/tiny

The latent cache has no heads that could be divided, so without the second option two GPUs hold no more tokens than one.
"""

import argparse
import os

PROMPTS = ["Attention lets every token", "How many tokens fit?", "def add(a, b):"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--share-cache", action="store_true", help="decode context parallelism")
    args = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams

    options = {}
    if torch.cuda.device_count() < 2:
        # A cache that is not nine tenths of all memory, no minute of compiling, and a core for each rank.
        options = {"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = args.model
    if model is None:
        from tiny_checkpoint import make_checkpoint

        model = str(make_checkpoint("models/tiny"))
    ranks_of_a_request = 2 if args.share_cache else 1
    llm = LLM(
        model=model,
        attention_backend="CUSTOM",
        dtype=args.dtype,
        max_model_len=1024,
        tensor_parallel_size=2,
        decode_context_parallel_size=ranks_of_a_request,
        **options,
    )
    for answer in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24)):
        print(f"{answer.prompt!r} -> {answer.outputs[0].text!r}")
    cache = llm.llm_engine.vllm_config.cache_config
    print(f"room for {cache.num_gpu_blocks * cache.block_size * ranks_of_a_request:,} cached tokens")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
