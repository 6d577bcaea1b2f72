"""Generate with vLLM in this process, attention by mla_backend.

    python examples/vllm_offline.py                         a tiny model with random weights, made in models/tiny
    python examples/vllm_offline.py MODEL                   a folder or a Hugging Face name of an MLA model
    python examples/vllm_offline.py MODEL "Hello, my name"  other prompts

The only thing that differs from any other vLLM program is `attention_backend="CUSTOM"`.
"""

import argparse

PROMPTS = ["Attention lets every token", "How many tokens fit?", "def add(a, b):"]


def options(device: str) -> dict:
    """What a CPU needs beside the flag: a cache that is not nine tenths of all memory, and no minute of compiling."""
    return {} if device == "cuda" else {"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("prompt", nargs="*", default=PROMPTS)
    args = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams

    model = args.model
    if model is None:
        from tiny_checkpoint import make_checkpoint

        model = str(make_checkpoint("models/tiny"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm = LLM(model=model, attention_backend="CUSTOM", max_model_len=1024, **options(device))
    for answer in llm.generate(args.prompt, SamplingParams(temperature=0, max_tokens=24)):
        print(f"{answer.prompt!r} -> {answer.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
