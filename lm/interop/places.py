"""Where each parameter stands in a checkpoint: names of its tensors and their layout, by the table of `lm/model/families`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.model.families.family import Family
from lm.model.parameter import axes_of
from lm.model.transformer import Transformer

OTHER_NAMES = {
    "embed/weight": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
EMBED, HEAD = OTHER_NAMES["embed/weight"], OTHER_NAMES["head/weight"]


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


def parameter_places(model: Transformer, family: Family) -> list[Place]:
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
