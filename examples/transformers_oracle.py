"""What Hugging Face transformers answers to the same prompts: the oracle that tokens and log-probabilities must equal.

python examples/transformers_oracle.py models/tiny-v2 "Attention lets every token"
"""

import argparse
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A greedy continuation.

    tokens: the new tokens, without the prompt.
    logprobs: natural log-probability of each.
    gaps: logit of each minus the second best logit. Where a gap is about as small as the rounding of the dtype,
        another correct implementation may choose the other token and go on differently.
    """

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]

    @property
    def smallest_gap(self) -> float:
        return min(self.gaps)


def generate(
    folder,
    prompts: list[list[int]],
    max_new_tokens: int,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
) -> list[Generation]:
    """Greedy continuation of each prompt (token ids), one prompt at a time so that no padding can matter.

    Always `max_new_tokens` long: the end-of-sequence token is neither a stop nor masked out. Match it with
    `ignore_eos=True` in vLLM.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = load(folder, dtype).to(device)
    model.generation_config.eos_token_id = None  # min_new_tokens would forbid the token instead of ignoring it
    return [_continue(model, torch.tensor([prompt], device=device), max_new_tokens) for prompt in prompts]


def load(folder, dtype: torch.dtype):
    """The checkpoint's model in transformers, on the CPU."""
    from transformers import AutoModelForCausalLM

    # "eager" is attention written out in PyTorch operations: no fused kernel takes part in the oracle.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    _scale_softmax(model)
    return model


def _scale_softmax(model) -> None:
    """Give DeepSeek-V2 the softmax scale of its authors' code, YaRN's factor squared and all.

    transformers 5.12.1 leaves the factor out, 5.19.0 has it, as for DeepSeek-V3 (`yarn_apply_mscale`).
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    if model.config.model_type != "deepseek_v2" or not rope.get("mscale_all_dim"):
        return
    factor = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    for layer in model.model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5 * factor**2


@torch.inference_mode()
def _continue(model, prompt_1T, max_new_tokens: int) -> Generation:
    answer = model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits_TC = torch.cat(answer.logits).float()
    tokens_T = answer.sequences[0, prompt_1T.shape[1] :]
    best_T2 = logits_TC.topk(2).values
    return Generation(
        tokens=tokens_T.tolist(),
        logprobs=logits_TC.log_softmax(-1).gather(1, tokens_T[:, None])[:, 0].tolist(),
        gaps=(best_T2[:, 0] - best_T2[:, 1]).tolist(),
    )


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in args.prompt]
    answers = generate(args.folder, prompts, args.max_new_tokens, args.dtype, args.device)
    for prompt, answer in zip(args.prompt, answers, strict=True):
        print(f"{prompt!r} -> {tokenizer.decode(answer.tokens)!r}")
        print(f"  tokens {answer.tokens}\n  smallest gap between the two best logits {answer.smallest_gap:.3f}")


if __name__ == "__main__":
    main()
