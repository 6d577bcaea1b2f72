"""A checkpoint whose kv_b_proj is in fp8 with a scale for each block of 128 x 128, as DeepSeek-V3's are."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK, LARGEST = 128, torch.finfo(torch.float8_e4m3fn).max


def quantise(folder: Path, place: Path) -> tuple[Path, Path]:
    """A copy of the checkpoint with that projection quantised, and one with what those values stand for."""
    quantised, plain = (Path(shutil.copytree(folder, place / name)) for name in ("quantised", "plain"))
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    codes, values = dict(weights), dict(weights)
    for name, weight in weights.items():
        if ".kv_b_proj." in name:
            code, scale = _in_blocks(weight.float())
            codes |= {name: code, name.replace("weight", "weight_scale_inv"): scale}
            values[name] = code.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    others = [name.removesuffix(".weight") for name in weights if ".kv_b_proj." not in name and "norm" not in name]
    save_file(codes, quantised / path.name, {"format": "pt"})
    save_file({name: value.float() for name, value in values.items()}, plain / path.name, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": others,
    }
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, plain


def _in_blocks(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes and the scale of each block, float32."""
    rows, columns = weight_OI.shape
    blocks = weight_OI.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
    return (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns), scale[:, 0, :, 0].contiguous()
