"""Where arrays live: logical axis names → mesh axes, one table, and the shardings that follow from it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "act_embed": None,
}


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def constrain(x: Array, *names: str | None) -> Array:
    """Say where an activation lives; without a mesh (`jax.set_mesh`) it says nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree with each leaf's NamedSharding in its place: by axis names where it has them, else replicated.

    Args:
        tree: abstract values (`jax.eval_shape`); parameters, optimizer state or a whole TrainState.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        place = NamedSharding(mesh, spec(leaf.get_metadata("out_sharding")))
        return jax.tree.map(lambda _: place, leaf)  # none where an optimizer keeps nothing for this parameter

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def abstract(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs that carry their shardings: what a restore or an ahead-of-time compile needs."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over every axis that splits data."""
    return NamedSharding(mesh, spec(("batch",)))
