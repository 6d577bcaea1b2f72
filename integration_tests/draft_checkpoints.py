"""Small checkpoints of models that guess ahead for a DeepSeek-V3 of one layer, and are often right.

MTP's extra layer and EAGLE's draft make from the embedding of the newest token and the hidden state before it an input
for one more layer, whose output goes through the model's head. Here they pass the embedding on and are a copy of the
model's only layer, so they guess what the model will say: exactly so if their attention sees what the model's does.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EMBEDDING_SIZE = 0.5  # root mean square of the embeddings of tiny_checkpoint.py
FIRST = "model.layers.0."


def with_mtp_layer(folder: Path, copy: Path) -> Path:
    """Copy a checkpoint to `copy` and give it an MTP layer."""
    weights = _start(folder, copy)
    made = _draft_layer(weights)
    made |= {
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
        "shared_head.head.weight": weights["lm_head.weight"],
        "shared_head.norm.weight": weights["model.norm.weight"],
        "eh_proj.weight": made.pop("projection"),
    }
    _save(weights | {f"model.layers.1.{name}": x for name, x in made.items()}, copy)
    return copy


def eagle_draft(folder: Path, draft: Path) -> Path:
    """Make an EAGLE draft for a checkpoint."""
    weights = _start(folder, draft)
    made = _draft_layer(weights)
    own = {name: made.pop(name) for name in ("enorm.weight", "hnorm.weight")} | {"fc.weight": made.pop("projection")}
    own |= {
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    _save(own | {f"layers.0.{name}": x for name, x in made.items()}, draft)
    return draft


def _start(folder: Path, copy: Path) -> dict[str, torch.Tensor]:
    """Copy a checkpoint, with a config that has a draft's layer, a dense one as the first is. Returns its weights."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    kind = config["model_type"], config["num_hidden_layers"]
    if kind != ("deepseek_v3", 1):
        raise ValueError(f"wanted a deepseek_v3 of one layer, got {kind}")
    config |= {"num_nextn_predict_layers": 1, "first_k_dense_replace": 2}
    (copy / "config.json").write_text(json.dumps(config))
    return load_file(copy / "model.safetensors")


def _draft_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's layer, and before it what leaves the embedding as it is and the hidden state out."""
    hidden, dtype = weights["model.embed_tokens.weight"].shape[1], weights["model.norm.weight"].dtype
    made = {name.removeprefix(FIRST): x for name, x in weights.items() if name.startswith(FIRST)}
    return made | {
        "enorm.weight": torch.full((hidden,), EMBEDDING_SIZE, dtype=dtype),
        "hnorm.weight": torch.ones(hidden, dtype=dtype),
        "projection": torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1).to(dtype),
    }


def _save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({name: x.clone() for name, x in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
