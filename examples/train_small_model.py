"""Train a small language model with MLA: one that has learnt something, unlike random weights.

    python examples/train_small_model.py models/small --minutes 5       on a GPU
    mla-backend bench quality models/small                              what a cache format costs it

DeepSeek-V3's architecture without experts, with its latent of 512 and rope of 64; 3 layers, 4 heads, 5.7 MB in
bfloat16. It learns the source of Python's standard library, and to find notes far back in a text (see
mla_backend/bench/quality_tasks.py). The learning rate falls with the time that is left, so a run ends when it was told
to; sequences grow from 512 to 8192 tokens on the way, because what to look for is learnt sooner from short ones.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_checkpoint import YARN, make_tokenizer

from mla_backend.bench.quality_tasks import MARKER, Notes, pieces, texts

VOCABULARY = 1024
SPECIAL = 4  # the first tokens: <s>, </s>, <pad>, <note>
END_OF_TEXT, NOTE_MARKER = 1, 3
LENGTHS = ((0.0, 512), (0.4, 2048), (0.7, 8192))  # (share of the time that is over, tokens of a sequence from then on)
TOKENS_OF_NOTE_PAIR = 64  # of text for each note that is planted twice
PEAK_RATE, WARM_UP = 3e-3, 0.02


def make_model():
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    layers, heads, hidden = 3, 4, 192
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=512,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=16384,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=END_OF_TEXT,
        pad_token_id=2,
    )
    config.num_nextn_predict_layers = 0  # vLLM reads it where transformers has no such field
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tokens_of(tokenizer, some_texts) -> list[int]:
    """All texts, each with its end, as one stream."""
    return [token for ids in tokenizer(list(some_texts), verbose=False)["input_ids"] for token in (*ids, END_OF_TEXT)]


def length_at(progress: float) -> int:
    return [length for begins, length in LENGTHS if begins <= progress][-1]


def rate_at(progress: float) -> float:
    """Linear rise, then half a cosine down to a tenth."""
    if progress < WARM_UP:
        return PEAK_RATE * progress / WARM_UP
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1)))


def progresses(minutes: float) -> Iterator[float]:
    """The share of the time that is over, until it is."""
    began = time.perf_counter()
    while (over := (time.perf_counter() - began) / (60 * minutes)) < 1:
        yield over


def batch(stream: list[int], notes: Notes, length: int, count: int, rng: random.Random) -> torch.Tensor:
    """[count, length + 1] tokens of random places in the stream, with notes; every fourth without."""
    rows = []
    for number in range(count):
        start = rng.randrange(len(stream) - length)
        text = stream[start : start + length + 1]
        rows.append(text if number % 4 == 3 else notes.plant(text, length // TOKENS_OF_NOTE_PAIR, rng))
    return torch.tensor(rows)


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of every token after the first."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(model, stream: list[int], notes: Notes, *, minutes: float, tokens_a_step: int, longest: int) -> None:
    device, rng = model.device, random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    seen, said = 0, -1.0
    for step, progress in enumerate(progresses(minutes)):
        length = min(length_at(progress), longest)
        tokens = batch(stream, notes, length, max(1, tokens_a_step // length), rng).to(device)
        loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress)
        optimizer.step()
        optimizer.zero_grad()
        seen += tokens.numel()
        if progress - said > 0.04:
            said = progress
            print(
                f"{progress:4.0%}  step {step}  {seen / 1e6:.1f}M tokens of {length}  loss {loss.item():.3f}",
                flush=True,
            )


@torch.inference_mode()
def examine(model, held_out: list[int], notes: Notes, lengths: list[int]) -> None:
    """Print perplexity and how many notes are found, among texts that the model has not seen."""
    for length in lengths:
        some = pieces(held_out, length, 8)
        loss = sum(loss_of(model, torch.tensor([text], device=model.device)).item() for text in some) / len(some)
        rng, right = random.Random(length), 0
        for text in some:
            recall = notes.recall(text, length - 64, rng)
            tokens = torch.tensor([recall.prompt + recall.answer], device=model.device)
            best = model(tokens[:, :-1], use_cache=False).logits[0, -len(recall.answer) :].argmax(-1)
            right += best.tolist() == recall.answer
        print(f"{length} tokens: perplexity {math.exp(loss):.3f}, {right} of {len(some)} notes found", flush=True)


def untie(model) -> None:
    """Give the output its own copy of the embeddings: vLLM (0.32) looks for one and takes none for this model type."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5, help="of training (default: %(default)s)")
    parser.add_argument("--tokens-a-step", type=int, default=65536, help="default: %(default)s")
    parser.add_argument("--longest", type=int, default=8192, help="most tokens of a sequence (default: %(default)s)")
    parser.add_argument("--files", type=int, help="most files of the standard library to read (default: all)")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    learnt, unseen = (list(itertools.islice(texts(held_out=held), options.files)) for held in (False, True))
    tokenizer = make_tokenizer(learnt[::4], VOCABULARY, more_special=(MARKER,), longest=16384)
    stream, held_out = tokens_of(tokenizer, learnt), tokens_of(tokenizer, unseen)
    notes = Notes(NOTE_MARKER, range(SPECIAL, VOCABULARY))
    model = make_model().to(device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{weights / 1e6:.2f}M weights; {len(stream) / 1e6:.2f}M tokens to learn, {len(held_out) / 1e6:.2f}M held out"
    )
    train(model, stream, notes, minutes=options.minutes, tokens_a_step=options.tokens_a_step, longest=options.longest)
    model = model.to(torch.bfloat16).eval()
    examine(model, held_out, notes, [length for _, length in LENGTHS if length <= options.longest])
    model.config.dtype = "bfloat16"
    untie(model)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(options.folder)


if __name__ == "__main__":
    main()
