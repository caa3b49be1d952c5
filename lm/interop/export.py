"""Writes a model as a safetensors checkpoint in the layout of Hugging Face transformers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from lm.experiment import UserError
from lm.interop.config import write_config
from lm.interop.places import parameter_places
from lm.interop.tensors import INDEX, listed
from lm.model.families import FAMILIES
from lm.model.transformer import Transformer


def write(model: Transformer, folder: Path, family: str = "") -> None:
    """Write config.json and model.safetensors with the names and layout of transformers.

    Args:
        family: model_type of the family to write, where several can represent the model; else the first of them.

    Raises:
        UserError: the model has what no family here has, or the folder has other weights, which would be read with these.
    """
    config = write_config(model.config, model.vocab_size, family)  # what cannot be written is said before anything is
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    others = [file.name for file in folder.glob("*.safetensors") if file.name != "model.safetensors"]
    others += [INDEX] if (folder / INDEX).exists() else []
    if others:
        raise UserError(f"{folder} has {listed(sorted(others))} of another model: name an empty folder")
    parts: dict[str, dict[int, np.ndarray]] = {}  # of every tensor, by the first row of each
    for place, leaf in zip(
        parameter_places(model, FAMILIES[config["model_type"]]), jax.tree.leaves(model), strict=True
    ):
        value = np.asarray(jax.device_get(leaf))
        for name, one in zip(place.names, value if place.stacked else value[None], strict=True):
            parts.setdefault(name, {})[place.first] = place.to_theirs(one)
    tensors = {
        name: np.ascontiguousarray(np.concatenate([found[row] for row in sorted(found)]))
        for name, found in parts.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
