"""A model from its config.json."""

import json
import pathlib
from dataclasses import dataclass
from types import SimpleNamespace

from mla_backend.models import family_of, geometry_of, mla_layers, text_config, weight_bytes
from mla_kernels import MLAGeometry


@dataclass(frozen=True, kw_only=True)
class Model:
    """name, geometry of the whole model, layers with a latent cache, bytes of the weights beside its config (0: none
    are there), and what it needs that we do not have."""

    name: str
    geometry: MLAGeometry
    layers: int
    weight_bytes: int
    missing: str


def load(path: pathlib.Path) -> Model:
    """The model of a config.json, or of the folder that holds one.

    Raises ValueError that says what is missing: the file, MLA, fields.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:  # no file, no text, no JSON
        raise ValueError(f"{file} must be a model's config.json: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must be a model's config.json, got a JSON {type(config).__name__}")
    text = SimpleNamespace(**_with_defaults(vars(text_config(config))))
    family = family_of(text)
    return Model(
        name=family.name,
        geometry=geometry_of(text),
        layers=mla_layers(text),
        weight_bytes=weight_bytes(file.parent),
        missing=family.missing,
    )


def _with_defaults(config: dict) -> dict:
    """With the fields that the file leaves to transformers, if it is installed and knows the model."""
    try:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict() | config
    except Exception:  # not installed, not known, or not taken: then the file has to say it all
        return config
