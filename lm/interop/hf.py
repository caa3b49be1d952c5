"""Reads and writes safetensors checkpoints in the layout of Hugging Face transformers; families are in `lm/model/families`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from lm.experiment import Model, UserError
from lm.interop.config import read_config, write_config
from lm.interop.tensors import INDEX, READ, Tensor, listed, read_folder
from lm.model.families import FAMILIES
from lm.model.families.family import Family
from lm.model.parameter import axes_of
from lm.model.transformer import Transformer
from lm.parallel.rules import shardings
from lm.stored import read_json

__all__ = ["FAMILIES", "read", "read_config", "write", "write_config"]

OTHER_NAMES = {
    "embed/weight": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
EMBED, HEAD = OTHER_NAMES["embed/weight"], OTHER_NAMES["head/weight"]
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.DOTALL)
FREQUENCIES = "self_attn.rotary_emb.inv_freq"  # which old checkpoints of Llama have in every layer


def read(folder: Path, mesh: Mesh | None = None, **changes: Any) -> Transformer:
    """Read the model in a folder with config.json and *.safetensors; every tensor must be used.

    Args:
        changes: fields of Model to set otherwise, such as compute_dtype.

    Raises:
        UserError: a file is missing or damaged, config.json has what the model has not, a tensor is missing, unexpected, of
            another shape or dtype, or not finite.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: a folder with config.json and *.safetensors is needed")
    described = read_json(path)
    family_config, vocab_size = read_config(described, str(path))
    family, config = FAMILIES[described["model_type"]], dataclasses.replace(family_config, **changes)
    tensors = read_folder(folder)
    make = functools.partial(Transformer, config, vocab_size)
    wanted = jax.eval_shape(lambda: make(jax.random.key(0)))
    places = _places(wanted, family)
    _refuse_other_tensors(folder, tensors, config, places)
    leaves = [_from_tensors(place, tensors) for place in places]
    model = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    return jax.device_put(model, shardings(wanted, mesh) if mesh is not None else None)


def write(model: Transformer, folder: Path) -> None:
    """Write config.json and model.safetensors with the names and layout of transformers.

    Raises:
        UserError: the model has what no family here has, or the folder has other weights, which would be read with these.
    """
    config = write_config(model.config, model.vocab_size)  # what cannot be written is said before anything is
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    others = [file.name for file in folder.glob("*.safetensors") if file.name != "model.safetensors"]
    others += [INDEX] if (folder / INDEX).exists() else []
    if others:
        raise UserError(f"{folder} has {listed(sorted(others))} of another model: name an empty folder")
    tensors: dict[str, np.ndarray] = {}
    for place, leaf in zip(_places(model, FAMILIES[config["model_type"]]), jax.tree.leaves(model), strict=True):
        value = np.asarray(jax.device_get(leaf))
        for name, one in zip(place.names, value if place.stacked else value[None], strict=True):
            tensors[name] = np.ascontiguousarray(place.to_theirs(one))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True)
class Place:
    """Location of a parameter in a checkpoint: its tensors (one per layer if stacked) and their layout."""

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]  # of one layer, ours
    dtype: Any
    inputs: int  # leading dimensions that are the input of a matrix; 0: no matrix, or one that lies as it does here

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Matrices are [out, in]; heads are no dimension of their own."""
        if not self.inputs:
            return (math.prod(self.shape),) if self.stacked else self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        return value.reshape(self.their_shape[::-1]).T if self.inputs else value.reshape(self.their_shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.inputs else tensor).reshape(self.shape)


def _places(model: Transformer, family: Family) -> list[Place]:
    """The place of every parameter, in the order of the leaves; the model may be abstract."""
    found = []
    params = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for path, param in params:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value, axes = param.get_value(), axes_of(param)
        stacked, shape = name.startswith("blocks/"), value.shape
        if stacked:
            theirs = family.layer_names[name.removeprefix("blocks/")]
            names = tuple(f"model.layers.{layer}.{theirs}" for layer in range(shape[0]))
            shape, axes = shape[1:], axes[1:]
        else:
            names = (OTHER_NAMES[name],)
        matrix = name.endswith("/weight") and name != "embed/weight"
        inputs = (2 if axes[1] == "head_dim" else 1) if matrix else 0
        found.append(Place(names, stacked, shape, jnp.dtype(value.dtype), inputs))
    return found


def _refuse_other_tensors(folder: Path, tensors: dict[str, Tensor], config: Model, places: list[Place]) -> None:
    """Raise, in one line that names all kinds of it, where the tensors are not those that config.json describes."""
    layers = {int(found[1]) for name in tensors if (found := LAYER.fullmatch(name)) and len(found[1]) < 10}
    count = max(layers, default=-1) + 1
    if config.num_layers != count:
        raise UserError(
            f"{folder}: config.json has num_hidden_layers {config.num_layers}, and the files have {count} layers"
        )
    if len(layers) < count:
        raise UserError(f"{folder}: the files lack {count - len(layers)} of the {count} layers of config.json")
    wanted = {name: place.their_shape for place in places for name in place.names}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and not _is_known(name, tensors, config)]
    shapes = [
        f"{name} {list(tensors[name].shape)} (config.json makes it {list(shape)})"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    dtypes = [f"{name} {tensors[name].dtype}" for name in wanted if name in tensors and tensors[name].dtype not in READ]
    faults = {
        "missing": missing,
        "unexpected, which the model does not have": unexpected,
        "of another shape": shapes,
        f"of a dtype other than {', '.join(READ)}": dtypes,
    }
    said = [f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {listed(names)}"
            for what, names in faults.items() if names]  # fmt: skip
    if said:
        raise UserError(f"{folder}: {'; '.join(said)}")


def _is_known(name: str, tensors: dict[str, Tensor], config: Model) -> bool:
    """Whether a tensor only repeats what the model has anyway: a tied head, or the frequencies of rope."""
    if name == HEAD and EMBED in tensors:
        same = tensors[name].shape == tensors[EMBED].shape and tensors[name].dtype == tensors[EMBED].dtype
        return same and tensors[name].dtype in READ and np.array_equal(tensors[name].read(), tensors[EMBED].read())
    found = LAYER.fullmatch(name)
    if found is None or found[2] != FREQUENCIES or config.rope_scaling or tensors[name].dtype not in READ:
        return False
    own = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return tensors[name].shape == own.shape and np.allclose(tensors[name].read().astype(float), own, rtol=1e-2)


def _from_tensors(place: Place, tensors: dict[str, Tensor]) -> np.ndarray:
    """One parameter of ours from theirs, all layers stacked."""
    values = [place.to_ours(_finite(name, tensors, place.dtype)) for name in place.names]
    return np.stack(values) if place.stacked else values[0]


def _finite(name: str, tensors: dict[str, Tensor], dtype: Any) -> np.ndarray:
    """A tensor in the dtype that it is kept in. Raises UserError where some of it is no number."""
    given = tensors[name].read()
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is counted below
        value = given.astype(dtype)
    if broken := int(value.size - np.isfinite(value).sum()):
        raise UserError(
            f"{tensors[name].file}: {name} has {broken} values of {value.size} that are no finite {dtype} numbers"
        )
    return value
