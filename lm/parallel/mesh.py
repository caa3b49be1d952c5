"""The device mesh of an experiment, and the checks that shapes fit it, before anything compiles."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh as DeviceMesh

from lm.experiment import Experiment, Mesh, UserError, rows_per_update


def axis_sizes(mesh: Mesh, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, the one that is -1 filled up.

    Raises:
        UserError: more than one -1, a size below 1, or a product that the devices do not make.
    """
    sizes = dataclasses.asdict(mesh)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {shown}: sizes are 1 or more, and at most one is -1")
    if fixed > devices:
        raise UserError(f"mesh {shown} wants {fixed} devices; there are {devices}")
    if free:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices and free:
        raise UserError(f"mesh {shown}: {fixed} does not divide the {devices} devices")
    return sizes


def make_mesh(mesh: Mesh) -> DeviceMesh:
    """The mesh over this machine's (or pod's) devices; a mesh smaller than them uses the first ones."""
    sizes = axis_sizes(mesh, jax.device_count())
    used = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=used)


def check_fits(experiment: Experiment, sizes: dict[str, int], vocab_size: int) -> None:
    """Every dimension that the mesh splits is a multiple of the axis that splits it, and the kernel is one of the devices'.

    Raises:
        UserError: names the field, its value, and the axis.
    """
    m = experiment.model
    if m.attention == "splash" and jax.default_backend() != "tpu":
        raise UserError(f"model.attention splash is a kernel for TPUs; the devices here are {jax.default_backend()}")
    split = {
        "model.embed_dim": (m.embed_dim, "fsdp"),
        "model.num_heads": (m.num_heads, "tensor"),
        "model.num_kv_heads": (m.num_kv_heads, "tensor"),
        "model.mlp_dim": (m.mlp_dim, "tensor"),
        "tokenizer.vocab_size": (vocab_size, "tensor"),
    }
    for name, (value, axis) in split.items():
        if value % sizes[axis]:
            raise UserError(f"{name} {value} is not a multiple of mesh.{axis} {sizes[axis]}")
    ways = sizes["data"] * sizes["fsdp"]
    for stage in experiment.stages:
        rows = rows_per_update(stage) // stage.microbatches
        if rows % ways:
            raise UserError(
                f"{stage.name}: {rows} rows in a microbatch (from {stage.name}.batch_size {stage.batch_size}) are not "
                f"a multiple of mesh.data x mesh.fsdp = {sizes['data']} x {sizes['fsdp']} = {ways}"
            )
