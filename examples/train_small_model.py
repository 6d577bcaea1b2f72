"""Train a small MLA language model that learned something: DeepSeek-V2's architecture, bytes as tokens.

    python examples/train_small_model.py models/small                    on a GPU: minutes, about 5 MB
    python examples/train_small_model.py models/small --steps 4 --batch 2 --length 512    on a CPU, to see it work

Random weights make attention flat, and hide what a rounded cache does to a model that looks at something. This one
learns the source and docstrings of the standard library of the Python that runs it (text under the PSF License), and
to copy what was said far back: notes such as `# note qvzk: 48213` between other text, which `# recall qvzk: 48213`
repeats.

It ends with the perplexity of modules that it has not seen, and with how often it recalls a note from afar.
"""

import argparse
import math
import random
import sysconfig
import zlib
from pathlib import Path

import torch

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]  # then 256 bytes
HELD_OUT = 20  # one module of so many is for measuring
NOTES = 6  # of a sequence
DIGITS = 5
ANSWER_WEIGHT = 8.0  # of a recalled digit's loss: they are few
RATE, WARM_UP = 2e-3, 100


# Text.


def library() -> tuple[bytes, bytes]:
    """The standard library's own modules, to train on and held out; which is which depends on their names alone."""
    root = Path(sysconfig.get_path("stdlib"))
    parts = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(name.parts):
            parts[zlib.crc32(str(name).encode()) % HELD_OUT == 0].append(path.read_bytes())
    return b"\n".join(parts[0]), b"\n".join(parts[1])


def window(text: bytes, length: int, rng: random.Random) -> bytes:
    first = rng.randrange(len(text) - length)
    return text[first : first + length]


def _note(rng: random.Random) -> tuple[bytes, bytes]:
    """A name and its number."""
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 4)
    return "".join(letters).encode(), str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)).encode()


def recall(text: bytes, length: int, rng: random.Random) -> tuple[bytes, list[int]]:
    """`length` bytes of text with notes in its first half that are recalled in its second, in another order; and where
    the recalled digits are."""
    notes = dict(_note(rng) for _ in range(NOTES))
    lines = [b"\n# note %s: %s\n" % note for note in notes.items()]
    lines += [b"\n# recall %s: %s\n" % note for note in rng.sample(list(notes.items()), len(notes))]
    room = (length - sum(map(len, lines))) // len(lines)
    if room < 1:
        raise ValueError(
            f"length must hold {NOTES} notes twice, {sum(map(len, lines)) + len(lines)} bytes, got {length}"
        )
    said, digits = b"", []
    for i, line in enumerate(lines):
        said += window(text, room, rng) + line
        if i >= len(notes):
            digits += range(len(said) - 1 - DIGITS, len(said) - 1)
    return said + window(text, length - len(said), rng), digits


def recall_from(text: bytes, distance: int, length: int, rng: random.Random) -> tuple[bytes, bytes]:
    """(text of about `length` bytes that ends where a number is to be recalled, that number): the note was `distance`
    bytes before, and others lie around it."""
    (name, number), *others = [_note(rng) for _ in range(NOTES)]
    note, question = b"\n# note %s: %s\n" % (name, number), b"\n# recall %s: " % name
    between = window(text, distance - len(note) - len(question), rng)
    before = window(text, max(1, length - distance), rng) + b"".join(b"\n# note %s: %s\n" % other for other in others)
    return before + note + between + question, number


def tokens_of(text: bytes) -> list[int]:
    return [len(SPECIAL_TOKENS) + byte for byte in text]


def batch(text: bytes, rows: int, length: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, [rows, length], and the weight of each one's loss. Every other row has notes to recall."""
    weights = torch.ones(rows, length)
    said = []
    for row in range(rows):
        if row % 2:
            sequence, digits = recall(text, length, rng)
            weights[row, digits] = ANSWER_WEIGHT
        else:
            sequence = window(text, length, rng)
        said.append(tokens_of(sequence))
    return torch.tensor(said), weights


# Model.


def new_model(length: int):
    """About 2.6 million parameters: latent 512 + rope 64, as large models have them, and little else."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, GenerationConfig

    layers = 3
    config = DeepseekV2Config(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,  # no experts
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        moe_layer_freq=1,
    )
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model


def new_tokenizer():
    """Bytes as tokens, in the form that engines load: byte pairs without any pair."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's letters for bytes: others come behind them
    hidden = iter(range(256, 512))
    letters = [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
    bytewise = Tokenizer(models.BPE({word: i for i, word in enumerate([*SPECIAL_TOKENS, *letters])}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=bos, eos_token=eos, pad_token=pad)


def losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token but the first, [rows, length - 1], in float32."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")


def rate_at(step: int, steps: int) -> float:
    """Rises linearly, falls as a cosine does to a tenth."""
    rising = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return RATE * rising * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(model, text: bytes, *, steps: int, rows: int, length: int, device: str) -> None:
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.to(device).train().parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        tokens, weights = (x.to(device) for x in batch(text, rows, length, rng))
        loss = (losses(model, tokens) * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate_at(step, steps)
        optimizer.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


# Measures.


@torch.inference_mode()
def perplexity(model, text: bytes, *, rows: int, length: int) -> float:
    """Of a byte, over `rows` windows that lie evenly in the text."""
    device, apart = model.device, (len(text) - length) // rows
    parts = [text[i * apart : i * apart + length] for i in range(rows)]
    means = [losses(model, torch.tensor([tokens_of(part)], device=device)).mean() for part in parts]
    return math.exp(torch.stack(means).mean())


@torch.inference_mode()
def recalled(model, text: bytes, distance: int, *, tries: int, length: int) -> float:
    """Share of notes of which every digit is the likeliest one, each after those before it."""
    right, rng = 0, random.Random(distance)
    for _ in range(tries):
        said, number = recall_from(text, distance, length - 200, rng)
        tokens = torch.tensor([tokens_of(said + number)], device=model.device)
        likeliest = model(tokens, use_cache=False).logits[0, -1 - DIGITS : -1].argmax(-1)
        right += torch.equal(likeliest, tokens[0, -DIGITS:])
    return right / tries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in {"steps": 4000, "batch": 32, "length": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text, held_out = library()
    print(f"{len(text) / 1e6:.1f} MB of text, {len(held_out) / 1e6:.1f} MB held out, on {device}", flush=True)
    model = new_model(chosen.length)
    train(model, text, steps=chosen.steps, rows=chosen.batch, length=chosen.length, device=device)
    model = model.eval().to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(chosen.folder)
    new_tokenizer().save_pretrained(chosen.folder)
    size = sum(file.stat().st_size for file in chosen.folder.iterdir())
    print(f"{chosen.folder}: {size / 1e6:.1f} MB")
    rows = min(64, chosen.batch)
    print(f"perplexity of a byte held out: {perplexity(model, held_out, rows=rows, length=chosen.length):.3f}")
    for distance in (chosen.length // 8, chosen.length // 2, chosen.length * 3 // 4):
        share = recalled(model, held_out, distance, tries=rows, length=chosen.length)
        print(f"recalled from {distance} bytes before: {share:.0%}")


if __name__ == "__main__":
    main()
