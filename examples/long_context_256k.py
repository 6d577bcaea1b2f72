"""A coding agent's session with one long context in vLLM, attention by mla_backend: a repository that is read once,
then short turns, each behind everything before it.

    python examples/long_context_256k.py MODEL                    on a GPU, an H200 say: a context of 256 Ki tokens
    python examples/long_context_256k.py FOLDER --random-weights  FOLDER needs config.json only; times stay the same
    python examples/long_context_256k.py --context 8192           on any machine: a tiny model, made in models/tiny

The first turn finds nothing in the prefix cache. Each later one finds all but its own tokens there, and shows what that
saves: time to the first token, and then tokens a second. Tokens are random; MODEL's tokenizer is not read.
"""

import argparse
import random
from functools import partial


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--context", type=int, default=1 << 18, help="tokens of the whole session")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=512, help="new tokens of a turn: what tools answered, say")
    parser.add_argument("--answer", type=int, default=256, help="tokens that the model writes in a turn")
    parser.add_argument("--random-weights", action="store_true")
    return parser.parse_args()


def reach(context: int, config):
    """Let a model's config have so many positions, with YaRN as far as it takes where the model has that."""
    config.max_position_embeddings = max(context, getattr(config, "max_position_embeddings", 0))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        rope["factor"] = max(rope["factor"], context / rope["original_max_position_embeddings"])
    return config


def start(args: argparse.Namespace):
    import torch
    from vllm import LLM

    model = args.model
    if model is None:
        from tiny_checkpoint import make_checkpoint

        model = str(make_checkpoint("models/tiny"))
    cpu = {"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}
    return LLM(
        model=model,
        attention_backend="CUSTOM",
        max_model_len=args.context,
        max_num_seqs=4,
        enable_prefix_caching=True,
        load_format="dummy" if args.random_weights else "auto",
        skip_tokenizer_init=True,
        hf_overrides=partial(reach, args.context),
        disable_log_stats=False,  # an answer then says when its tokens came
        **({} if torch.cuda.is_available() else cpu),
    )


def main() -> None:
    args = arguments()
    rng = random.Random(0)

    def text(tokens: int) -> list[int]:
        return [rng.randrange(3, 500) for _ in range(tokens)]

    read_once = args.context - args.turns * (args.turn + args.answer)
    if read_once < 1:
        raise SystemExit(
            f"--context must be more than {args.context - read_once}, what the turns take; got {args.context}"
        )
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=args.answer, ignore_eos=True, detokenize=False)
    llm, session = start(args), text(read_once)
    print(f"{'turn':>4}{'tokens':>9}{'cached':>9}{'first token, ms':>17}{'tokens a second':>17}")
    for turn in range(1, args.turns + 1):
        session += text(args.turn)
        answer = llm.generate({"prompt_token_ids": session}, sampling, use_tqdm=False)[0]
        came = answer.metrics
        speed = (args.answer - 1) / max(came.last_token_ts - came.first_token_ts, 1e-9)
        first = 1e3 * came.first_token_latency
        print(f"{turn:4}{len(session):9,}{answer.num_cached_tokens:9,}{first:17.1f}{speed:17.1f}")
        session += answer.outputs[0].token_ids


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
