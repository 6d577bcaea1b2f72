"""Generate with SGLang in this process, attention by mla_backend.

    python examples/sglang_offline.py                         a tiny model with random weights, made in models/tiny
    python examples/sglang_offline.py MODEL                   a folder or a Hugging Face name of an MLA model
    python examples/sglang_offline.py MODEL "Hello, my name"  other prompts

The only thing that differs from any other SGLang program is `attention_backend="mla_backend"`.
"""

import argparse

PROMPTS = ["Attention lets every token", "How many tokens fit?", "def add(a, b):"]


def options(device: str) -> dict:
    """What a CPU needs beside the backend's name: sampling and grammars without CUDA packages, and a small cache."""
    if device == "cuda":
        return {}
    return {"device": "cpu", "sampling_backend": "pytorch", "grammar_backend": "none", "max_total_tokens": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("prompt", nargs="*", default=PROMPTS)
    args = parser.parse_args()

    import sglang
    import torch

    model = args.model
    if model is None:
        from tiny_checkpoint import make_checkpoint

        model = str(make_checkpoint("models/tiny"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # SGLang's engine logs errors alone unless asked; "info" shows the line that says which kernels run.
    ours = {"attention_backend": "mla_backend", "log_level": "info"}
    with sglang.Engine(model_path=model, context_length=1024, **ours, **options(device)) as engine:
        answers = engine.generate(args.prompt, {"temperature": 0, "max_new_tokens": 24})
    for prompt, answer in zip(args.prompt, answers, strict=True):
        print(f"{prompt!r} -> {answer['text']!r}")


if __name__ == "__main__":  # SGLang starts processes that import this file again
    main()
