"""Where arrays live: logical axis names → mesh axes, one table, and the shardings that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    # activations
    "batch": ("slices", "data", "fsdp", "expert"),
    "length": ("context",),
    "act_embed": (),
}


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names."""
    return PartitionSpec(*(_entry(RULES[name]) if name else None for name in names))


def ways(name: str, sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of these axis sizes splits a dimension of this logical name."""
    return math.prod(sizes[axis] for axis in RULES[name])


def platform() -> str:
    """What the devices are that the code being traced is for: "cpu", "gpu" or "tpu"; right ahead of time too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def one_device() -> bool:
    """Whether the code being traced is for one device, so that nothing is partitioned."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def device_kind() -> str:
    """jax's name of the devices that the code being traced is for, for instance "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def split_ways(size: int, name: str) -> int:
    """Into how many parts the mesh that is set splits a dimension of this size and logical name; 1 if it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else ways(name, mesh.shape)
    return 1 if size % parts else parts


def constrain(x: Array, *names: str | None) -> Array:
    """Say where an activation lives; without a mesh (`jax.set_mesh`) it says nothing.

    A dimension that its axes do not divide stays whole: the rows of an evaluation may be few.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sized = zip(names, x.shape, strict=False)  # dimensions after the last name are whole
    fits = (name if name and split_ways(size, name) > 1 else None for name, size in sized)
    return jax.lax.with_sharding_constraint(x, spec(tuple(fits)))


def row_major(x: Array, *names: str) -> Array:
    """Ask the TPU compiler for the layout that the array's shape shows; left to itself it changes it back and forth.

    Where the mesh splits rows of tokens each device asks for its own part: libtpu 0.0.42 would gather the whole array on
    every device for the constraint otherwise, in every layer (0.6B, rows of 8,192 over two devices: 921 ms a step, not 593).
    """
    if platform() != "tpu":
        return x

    def ask(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    if all(split_ways(size, name) == 1 for size, name in zip(x.shape, names, strict=True) if name == "length"):
        return ask(x)
    return jax.shard_map(ask, in_specs=spec(names), out_specs=spec(names), check_vma=False)(x)


def gathered(w: Array, names: tuple[str | None, ...], dtype: Any) -> Array:
    """A parameter in the dtype of the computation, whole along `embed` on every device.

    Said explicitly because of what travels: the cast comes before the gather, and the gradient is summed over the
    devices, each keeping its part, before it is cast back.
    """

    @jax.custom_vjp
    def gather(w: Array) -> Array:
        return constrain(w.astype(dtype), *(None if name == "embed" else name for name in names))

    def forward(w: Array) -> tuple[Array, None]:
        return gather(w), None

    def backward(_: None, g: Array) -> tuple[Array]:
        return (constrain(g, *names).astype(w.dtype),)

    gather.defvjp(forward, backward)
    return gather(w)


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


def _entry(axes: tuple[str, ...]) -> tuple[str, ...] | str | None:
    return axes if len(axes) > 1 else (axes[0] if axes else None)
