"""Reads safetensors checkpoints in the layout of Hugging Face transformers; `export.py` writes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm.experiment import Model, UserError
from lm.interop.arrays import read_array
from lm.interop.config import read_config, write_config
from lm.interop.export import write
from lm.interop.places import EMBED, HEAD, Place, parameter_places
from lm.interop.tensors import READ, Tensor, read_folder, refuse_tensors
from lm.model.families import FAMILIES
from lm.model.families.family import Family
from lm.model.parameter import axes_of, leaf_name, parameter
from lm.model.transformer import Transformer
from lm.parallel.distributed import raise_on_all
from lm.parallel.rules import shardings
from lm.stored import read_json

__all__ = [
    "FAMILIES",
    "assemble",
    "check",
    "describe",
    "dtype",
    "files",
    "read",
    "read_config",
    "write",
    "write_config",
]

Store = Callable[[str, nnx.Param, int], Any]
"""Converts a parameter to its stored form, given its name and the number of leading input dimensions of a matrix."""
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.DOTALL)
FREQUENCIES = "self_attn.rotary_emb.inv_freq"  # a tensor of every layer in old Llama checkpoints


def describe(folder: Path) -> tuple[Model, int]:
    """The model and vocabulary size of a folder's config.json.

    Raises:
        UserError: the folder or file is missing, or config.json has an unsupported feature.
    """
    return _described(Path(folder))[1:]


def check(folder: Path) -> None:
    """Raise UserError unless the tensors in a folder are those that its config.json describes; no values are read."""
    _opened(Path(folder))


def dtype(folder: Path) -> str:
    """bfloat16 if all tensors in a folder have it, else float32."""
    return "bfloat16" if {tensor.dtype for tensor in read_folder(folder).values()} == {"BF16"} else "float32"


def files(folder: Path) -> list[Path]:
    """The files of a folder that determine its model."""
    return [folder / "config.json", *sorted({tensor.file for tensor in read_folder(folder).values()})]


def _described(folder: Path) -> tuple[Family, Model, int]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(_why_missing(folder))
    try:
        described = read_json(path)
    except UserError as error:
        raise UserError(f"{error}: fetch it again; a gated model needs a login with its licence accepted") from error
    model, vocab_size = read_config(described, str(path))
    return FAMILIES[described["model_type"]], model, vocab_size


def _why_missing(folder: Path) -> str:
    """What to do about a folder without config.json."""
    if not folder.is_dir():
        return (
            f"there is no folder {folder}: it should have config.json and *.safetensors; nothing is downloaded, `hf download "
            "NAME --local-dir FOLDER` fetches a model"
        )
    if snapshots := sorted(str(path.parent) for path in folder.glob("snapshots/*/config.json")):
        return f"{folder} has no config.json; name the snapshot in it, {snapshots[-1]}"
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{folder} has no config.json; name the GGUF file in it, gguf:{folder / files[0]}"
    return (
        f"{folder} has no config.json: it should have config.json and *.safetensors; the download may have been refused"
    )


def _opened(folder: Path, **changes: Any) -> tuple[Transformer, list[Place], dict[str, Tensor]]:
    """The abstract model of a folder, the places of its parameters, and its tensors by name."""
    family, config, vocab_size = _described(folder)
    config = dataclasses.replace(config, **changes)
    tensors = read_folder(folder)
    wanted = jax.eval_shape(lambda: Transformer(config, vocab_size, jax.random.key(0)))
    places = parameter_places(wanted, family)
    _refuse_other_tensors(folder, tensors, config, places)
    return wanted, places, tensors


def read(folder: Path, mesh: Mesh | None = None, store: Store | None = None, **changes: Any) -> Transformer:
    """Read the model in a folder with config.json and *.safetensors; every tensor must be used.

    Args:
        store: called with each parameter before the next one is read; the model keeps its result.
        changes: fields of Model to override, such as compute_dtype.

    Raises:
        UserError: a file is missing or damaged, config.json has an unsupported feature, or a tensor is missing, unexpected, not
            finite, or has another shape or dtype.
    """
    return assemble(*_opened(Path(folder), **changes), mesh, store)


def assemble(
    wanted: Transformer,
    places: list[Place],
    tensors: dict[str, Tensor],
    mesh: Mesh | None = None,
    store: Store | None = None,
) -> Transformer:
    """The abstract model `wanted` with the values of its tensors. Raises UserError if a value is not finite."""
    where = [None] * len(places) if mesh is None else jax.tree.leaves(shardings(wanted, mesh))
    if store is None:
        read = [read_array(place, tensors, sharding) for place, sharding in zip(places, where, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(wanted), read)
    params, structure = jax.tree_util.tree_flatten_with_path(wanted, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def kept(path: tuple[Any, ...], param: nnx.Param, place: Place, sharding: Any) -> Any:
        # `store` may be a computation of all processes; a process that cannot read must not leave the others waiting.
        value = raise_on_all(lambda: read_array(place, tensors, sharding))
        return jax.block_until_ready(store(leaf_name(path), parameter(value, axes_of(param)), place.inputs))

    leaves = [kept(*one, *at) for one, *at in zip(params, places, where, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def _refuse_other_tensors(folder: Path, tensors: dict[str, Tensor], config: Model, places: list[Place]) -> None:
    """Raise UserError unless the tensors are those that config.json describes; it lists all differences."""
    layers = {int(found[1]) for name in tensors if (found := LAYER.fullmatch(name)) and len(found[1]) < 10}
    count = max(layers, default=-1) + 1
    if config.num_layers != count:
        raise UserError(
            f"{folder}: config.json has num_hidden_layers {config.num_layers}, and the files have {count} layers"
        )
    if len(layers) < count:
        raise UserError(f"{folder}: the files lack {count - len(layers)} of the {count} layers of config.json")
    wanted = {name: place.their_shape for place in places for name in place.names}
    used = {name: tensor for name, tensor in tensors.items() if name in wanted or not _is_known(name, tensors, config)}
    refuse_tensors(str(folder), used, wanted, "config.json")


def _is_known(name: str, tensors: dict[str, Tensor], config: Model) -> bool:
    """Whether a tensor is redundant: a copy of the tied head, or RoPE frequencies that follow from config.json."""
    if name == HEAD and EMBED in tensors:
        same = tensors[name].shape == tensors[EMBED].shape and tensors[name].dtype == tensors[EMBED].dtype
        if not same or tensors[name].dtype not in READ:
            return False
        pairs = zip(tensors[name].blocks(), tensors[EMBED].blocks(), strict=True)
        return all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pairs)
    found = LAYER.fullmatch(name)
    if found is None or found[2] != FREQUENCIES or config.rope_scaling or tensors[name].dtype not in READ:
        return False
    own = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return tensors[name].shape == own.shape and np.allclose(tensors[name].read().astype(float), own, rtol=1e-2)
