"""Locations of parameters in a checkpoint: tensor names and layouts, by the table of `lm/model/families`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    """Location of a parameter in a checkpoint: its tensors (one per layer if stacked), which rows of them, and their layout.

    Several parameters may share a tensor, such as a fused projection; `rows` is then the slice of its first dimension.
    """

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]  # of one layer, ours
    dtype: Any
    inputs: int  # leading dimensions that are the input of a matrix; 0: no matrix, or one that lies as it does here
    first: int = 0  # row of the tensor with which the parameter begins
    others: int = 0  # rows of the tensor that belong to other parameters

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the parameter in the tensor: matrices are [out, in]; heads are not a separate dimension."""
        if not self.inputs:
            return (math.prod(self.shape),) if self.stacked else self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.part_shape[0] + self.others, *self.part_shape[1:]

    @property
    def rows(self) -> slice:
        """Rows of the tensor that hold the parameter; all of them, unless the tensor is shared."""
        return slice(self.first, self.first + self.part_shape[0])

    def part(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Rows, and columns, of the tensor with a part of one layer; of several dimensions that are one only the first is split."""
        if self.inputs:
            rows, columns = (
                _flat(self.shape[some], index[some]) for some in (slice(self.inputs, None), slice(self.inputs))
            )
            return slice(rows.start + self.first, rows.stop + self.first), columns
        if self.stacked:
            return (_flat(self.shape, index),)
        return tuple(_flat((size,), (one,)) for size, one in zip(self.shape, index, strict=True))

    def shaped(self, part: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The values of such a part in the shape of the part of the layer, without a copy."""
        shape = [len(range(*one.indices(size))) for size, one in zip(self.shape, index, strict=True)]
        return (part.T if self.inputs else part).reshape(shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """One layer of the parameter as the `rows` of its tensor."""
        return value.reshape(self.part_shape[::-1]).T if self.inputs else value.reshape(self.part_shape)


def _flat(sizes: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """A part of several dimensions, of which only the first is split, as a part of one."""
    inner = math.prod(sizes[1:])
    start, stop, _ = index[0].indices(sizes[0])
    return slice(start * inner, stop * inner)


def parameter_places(model: Transformer, family: Family) -> list[Place]:
    """The place of every parameter, in the order of the model's leaves; the model may be abstract."""
    found: dict[str, Place] = {}
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
        found[name] = Place(names, stacked, shape, jnp.dtype(value.dtype), inputs)
    return [_among_others(name, found, family) for name in found]


def _among_others(name: str, places: dict[str, Place], family: Family) -> Place:
    """The place of a parameter in a shared tensor, after the parameters that precede it in the family's table."""
    order = [f"blocks/{ours}" for ours in family.layer_names]
    sharing = [other for other in order if other in places and places[other].names == places[name].names]
    if len(sharing) < 2:
        return places[name]
    rows = [places[other].part_shape[0] for other in sharing]
    own = sharing.index(name)
    return replace(places[name], first=sum(rows[:own]), others=sum(rows) - rows[own])
