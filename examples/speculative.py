"""Speculative decoding by n-grams in vLLM, attention by mla_backend: how much of what is guessed is taken.

    python examples/speculative.py                       a tiny model with random weights, made in models/tiny
    python examples/speculative.py MODEL --tokens 5      another model, and up to 5 guesses a step

What followed the last few tokens before is guessed to follow again. A step checks all guesses of a request at once:
they are its query tokens, and decode reads the cached context once for them. A guess is kept only where the model would
have written it, so answers stay what they were.
"""

import argparse

PROMPTS = [
    "one two three one two three one two three one two three",
    "def add(a, b):\n    return a + b\ndef sub(a, b):\n    return a",
    "How many tokens fit?",
]


def options(device: str) -> dict:
    """What a CPU needs beside the flag: a cache that is not nine tenths of all memory, and no minute of compiling."""
    return {} if device == "cuda" else {"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=3, help="guesses a step, at most")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    args = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams

    model = args.model
    if model is None:
        from tiny_checkpoint import make_checkpoint

        model = str(make_checkpoint("models/tiny"))
    llm = LLM(
        model=model,
        attention_backend="CUSTOM",
        dtype=args.dtype,
        max_model_len=1024,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": args.tokens,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
        disable_log_stats=False,  # it counts the guesses
        **options("cuda" if torch.cuda.is_available() else "cpu"),
    )
    for answer in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True)):
        print(f"{answer.prompt!r} -> {answer.outputs[0].text!r}")

    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    checks, guessed, taken = (counted[f"vllm:spec_decode_{name}"] for name in names)
    rate = 1 + taken / max(checks, 1)
    print(f"{guessed} tokens guessed in {checks} steps of a request, {taken} taken: {rate:.2f} tokens a step")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
