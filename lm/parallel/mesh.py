"""The device mesh of an experiment, and checks that shapes fit it before compilation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh as DeviceMesh

from lm.experiment import Experiment, Mesh, RolloutMesh, UserError, rows_per_update
from lm.parallel.rules import RULES, ways


def axis_sizes(mesh: Mesh, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 resolved.

    Raises:
        UserError: more than one -1, a size below 1, or a product that does not match the devices.
    """
    sizes = dataclasses.asdict(mesh)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = _shown({name: size for name, size in sizes.items() if size != 1} or {"data": 1})
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {shown}: sizes are 1 or more, and at most one is -1")
    if fixed > devices:
        raise UserError(f"mesh {shown} needs {fixed} devices; there are {devices}")
    if free:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices and free:
        raise UserError(f"mesh {shown}: {fixed} does not divide the {devices} devices")
    return sizes


def make_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> DeviceMesh:
    """Make the mesh over the devices (None: all of this run); a smaller mesh uses the first devices.

    Within a slice the axes follow the interconnect, the last ones (tensor, then context) over nearest neighbours; the
    axis `slices` spans the network between slices.

    Raises:
        UserError: the sizes do not fit the devices, or `mesh.slices` is not their number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(mesh, len(devices))
    used = devices[: math.prod(sizes.values())]
    slices = len({getattr(device, "slice_index", 0) for device in used})
    if slices > 1 and slices != sizes["slices"]:
        raise UserError(f"the devices are of {slices} slices; mesh.slices is {sizes['slices']}, it should be {slices}")
    shape = tuple(sizes.values())
    if slices > 1:
        across = tuple(size if name == "slices" else 1 for name, size in sizes.items())
        inside = tuple(1 if name == "slices" else size for name, size in sizes.items())
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, used, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    return DeviceMesh(np.asarray(placed), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def rollout_sizes(layout: RolloutMesh, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the mesh axes while completions are sampled: `tensor` devices of a slice split heads, the others completions.

    Args:
        sizes: of the mesh of training, which has the same devices.
    """
    if not layout.tensor:
        return dict(sizes)
    inside = math.prod(sizes.values()) // sizes["slices"]
    return dict.fromkeys(sizes, 1) | {
        "slices": sizes["slices"],
        "data": inside // layout.tensor,
        "tensor": layout.tensor,
    }


def rollout_mesh(layout: RolloutMesh, mesh: DeviceMesh) -> DeviceMesh:
    """The devices of the mesh of training, in the same order, arranged for sampling.

    One program reads arrays of both meshes because the order is the same, and devices that split heads are neighbours in both.
    """
    sizes = rollout_sizes(layout, mesh.shape)
    return DeviceMesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes), axis_types=mesh.axis_types)


def sampler_mesh(layout: RolloutMesh) -> DeviceMesh | None:
    """The mesh of the devices that only sample, the last of this run; None if sampling and training take turns."""
    if not layout.devices:
        return None
    return rollout_mesh(layout, make_mesh(Mesh(data=-1), jax.devices()[-layout.devices :]))


def check_split(experiment: Experiment, devices: int, platform: str | None = None) -> None:
    """Check that `rollout_mesh.devices` of these devices can sample while the others train.

    Raises:
        UserError: they cannot; names the numbers that can.
    """
    asked, stages = experiment.rollout_mesh.devices, experiment.stages
    if not asked:
        return
    if not any(stage.objective.staleness for stage in stages):
        raise UserError(
            f"rollout_mesh.devices is {asked} and no stage has objective.max_staleness: these devices would wait while the others "
            "train; rollout_mesh.devices should be 0, or max_staleness at least 1"
        )
    if told := _split_problem(experiment, devices, asked, platform):
        can = [str(n) for n in range(1, devices) if not _split_problem(experiment, devices, n, platform)]
        remedy = f"it can be {', '.join(can[:12])}" if can else "no number can: it should be 0, taking turns"
        raise UserError(f"rollout_mesh.devices is {asked} of {devices} devices: {told}; {remedy}")


def _split_problem(experiment: Experiment, devices: int, asked: int, platform: str | None) -> str:
    """Why this number of devices cannot sample alone; "" if it can."""
    if asked >= devices:
        return "none is left for training"
    try:
        check_fits(experiment, axis_sizes(experiment.mesh, devices - asked), platform)
        sizes = axis_sizes(Mesh(data=-1), asked)
        _check_rollout_mesh(experiment, sizes)
    except UserError as error:
        return str(error)
    parts = rollout_sizes(experiment.rollout_mesh, sizes)["data"]
    for stage in experiment.stages:
        rows = rows_per_update(stage) // stage.microbatches
        if stage.objective.staleness and rows % parts:
            return f"{stage.name}: {rows} rows in a microbatch are not a multiple of {parts}"
    return ""


def check_fits(experiment: Experiment, sizes: dict[str, int], platform: str | None = None) -> None:
    """Check that sharded dimensions are divisible by their mesh axes and that the attention kernel suits the devices.

    The vocabulary need not be: XLA pads it (`constrain` in `rules.py`).

    Args:
        platform: platform of the devices; None: this machine's.

    Raises:
        UserError: names the field, its value, its divisors and the axes.
    """
    m = experiment.model
    platform = platform or jax.default_backend()
    _check_rollout_mesh(experiment, sizes)
    if m.attention == "splash" and platform != "tpu":
        raise UserError(f"model.attention splash is a kernel for TPUs; the devices here are {platform}")
    split = {
        "model.embed_dim": (m.embed_dim, "embed"),
        "model.num_heads": (m.num_heads, "heads"),
        "model.num_kv_heads": (m.num_kv_heads, "kv_heads"),
        "model.mlp_dim": (m.mlp_dim, "mlp"),
    } | {f"{stage.name}.seq_len": (stage.seq_len, "length") for stage in experiment.stages}
    for field, (value, name) in split.items():
        if value % ways(name, sizes):
            raise UserError(f"{field} {value} is not a multiple of {_axes(name, sizes)}; {_divisors(value)}")
    for stage in experiment.stages:
        rows = rows_per_update(stage) // stage.microbatches
        if rows % ways("batch", sizes):
            raise UserError(
                f"{stage.name}: {rows} rows in a microbatch (from {stage.name}.batch_size {stage.batch_size}) are not "
                f"a multiple of {_axes('batch', sizes)}; {_divisors(rows)}"
            )


def _check_rollout_mesh(experiment: Experiment, sizes: dict[str, int]) -> None:
    """Raise UserError if the devices or the model cannot be split as `rollout_mesh` says; it lists the sizes that can."""
    m, asked = experiment.model, experiment.rollout_mesh.tensor
    devices = math.prod(sizes.values()) // sizes["slices"]
    split = {
        "model.num_heads": m.num_heads,
        "model.num_kv_heads": m.num_kv_heads,
        "model.mlp_dim": m.mlp_dim,
    }
    common = math.gcd(devices, *split.values())
    if asked and common % asked:
        told = ", ".join(f"{field} {value}" for field, value in split.items())
        raise UserError(
            f"rollout_mesh.tensor is {asked}; it should divide the {devices} devices of the mesh{'' if sizes['slices'] == 1 else ' in a slice'}, "
            f"{told}: {_listed(common)}, or be 0, the mesh of training"
        )


def _axes(name: str, sizes: dict[str, int]) -> str:
    """`mesh.data x mesh.fsdp = 2 x 2 = 4`, of the axes larger than 1."""
    used = [axis for axis in RULES[name] if sizes[axis] > 1]
    if len(used) == 1:
        return f"mesh.{used[0]} {sizes[used[0]]}"
    product = " x ".join(str(sizes[axis]) for axis in used)
    return f"{' x '.join(f'mesh.{axis}' for axis in used)} = {product} = {ways(name, sizes)}"


def _divisors(value: int) -> str:
    return f"{value} divides by {_listed(value)}"


def _listed(value: int) -> str:
    """The divisors of a number as text, the middle of many left out."""
    shown = [str(n) for n in range(1, value + 1) if value % n == 0]
    return ", ".join([*shown[:8], "…", *shown[-3:]] if len(shown) > 12 else shown)


def _shown(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())
