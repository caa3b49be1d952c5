"""Sharding rules: one table of logical axis names → mesh axes, and the shardings derived from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
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
    "rank": (),
    # activations
    "batch": ("slices", "data", "fsdp", "expert"),
    "sampled": ("slices", "data", "fsdp", "expert", "tensor"),  # rows of logits from which tokens are chosen
    "length": ("context",),
    "act_embed": (),
}


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names."""
    return PartitionSpec(*(_entry(RULES[name]) if name else None for name in names))


def ways(name: str | None, sizes: Mapping[str, int]) -> int:
    """Number of shards of a dimension with this logical name on a mesh of these axis sizes; one without a name has 1."""
    return math.prod(sizes[axis] for axis in RULES[name]) if name else 1


def platform() -> str:
    """Platform that the traced code is for: "cpu", "gpu" or "tpu"; also correct for ahead-of-time compilation."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def one_device() -> bool:
    """Whether the traced code is for a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def device_kind() -> str:
    """Device kind that the traced code is for, for instance "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def split_ways(size: int, name: str) -> int:
    """Number of shards of a dimension of this size and logical name on the current mesh; 1 if not divisible."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else ways(name, mesh.shape)
    return 1 if size % parts else parts


def constrain(x: Array, *names: str | None) -> Array:
    """Constrain an activation's sharding by logical axis names; does nothing without a mesh (`jax.set_mesh`).

    A dimension not divisible by its axes is not sharded: an evaluation may have few rows. The vocabulary is: XLA pads it
    inside the program, and no number depends on the padding.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sized = zip(names, x.shape, strict=False)  # dimensions after the last name are not sharded
    fits = (name if name and _splits(size, name, mesh.shape) else None for name, size in sized)
    return jax.lax.with_sharding_constraint(x, spec(tuple(fits)))


def _splits(size: int, name: str, sizes: Mapping[str, int]) -> bool:
    parts = ways(name, sizes)
    return parts > 1 and (name == "vocab" or size % parts == 0)


def row_major(x: Array, *names: str) -> Array:
    """Request row-major layout from the TPU compiler, which otherwise changes layouts back and forth.

    Each device asks for its own part, in shard_map: libtpu 0.0.42 gathers, or sums, the array of the whole batch on every device
    for a constraint outside of it wherever it has not propagated the sharding so far, in every layer (the 70B of
    experiments/pods on 64 devices, and rows that the mesh splits).
    """
    if platform() != "tpu":
        return x

    def ask(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    place = spec(tuple(name if split_ways(size, name) > 1 else None for size, name in zip(x.shape, names, strict=True)))
    return ask(x) if one_device() else jax.shard_map(ask, in_specs=place, out_specs=place, check_vma=False)(x)


def gathered(w: Array, names: tuple[str | None, ...], dtype: Any) -> Array:
    """Gather a parameter along `embed` on every device, cast to the compute dtype.

    Explicit to control the traffic: the cast comes before the gather, and the gradient is reduce-scattered over the
    devices before it is cast back.
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


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a tree's leaves: by logical axis names where a leaf has them, else replicated.

    A program cannot be given an array that its devices do not divide. So a table of such a vocabulary is whole along this
    dimension between steps, and no layout changes its shape.

    Args:
        tree: abstract values (`jax.eval_shape`); parameters, optimizer state or a whole TrainState.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        names = leaf.get_metadata("out_sharding")
        # No leaves where an optimizer has no state for this parameter. Scales of a quantised weight may be too few to be split.
        return jax.tree.map(lambda x: NamedSharding(mesh, spec(_divisible(names, x.shape, mesh.shape))), leaf)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _divisible(
    names: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The names of the dimensions, None in place of one whose size is no multiple of its shards.

    One layer of a stack lacks the first dimension, which keeps its name.
    """
    names = names[len(names) - len(shape) :]
    return tuple(name if size % ways(name, sizes) == 0 else None for name, size in zip(names, shape, strict=True))


def abstract(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs with shardings, as checkpoint restore and ahead-of-time compilation need."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batches: rows are split over all data axes."""
    return NamedSharding(mesh, spec(("batch",)))


def _entry(axes: tuple[str, ...]) -> tuple[str, ...] | str | None:
    return axes if len(axes) > 1 else (axes[0] if axes else None)
