"""What devices send each other in an update, in bytes by mesh axis, and how long the wires are busy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm.parallel.rules import RULES, ways
from lm.plan.hlo_work import RING
from lm.plan.one_device import SPLIT, local_batch, one_device
from lm.plan.program import Program
from lm.steps import needs_reference

NETWORK = "slices"  # the axis that goes over the data-centre network


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over some axes of the mesh, in an update, on one device."""

    what: str
    axes: tuple[str, ...]
    kind: str
    devices: int
    bytes: float  # payload
    seconds: float


def traffic(program: Program) -> list[Traffic]:
    """Every collective of an update, but for sums of a few numbers."""
    found = [*_parameters(program), *_activations(program)]
    return [item for item in found if item.devices > 1]


def _one(program: Program, what: str, axes: tuple[str, ...], kind: str, size: float) -> Traffic:
    chip, axes = program.topology.chip, tuple(axis for axis in axes if program.sizes[axis] > 1)
    devices = math.prod(program.sizes[axis] for axis in axes)
    rate = chip.network if NETWORK in axes else chip.interconnect
    return Traffic(what, axes, kind, devices, size, size * RING[kind](devices) / rate if devices > 1 else 0.0)


def _parameters(program: Program) -> list[Traffic]:
    """Parameters are gathered by forward and backward pass; gradients are summed over all that split rows or tokens.

    Both in the compute dtype, once a microbatch. A device sums whole gradients over the axes that its parameters lie in
    parts on (the compiler makes an all-reduce of it and keeps a part), and over the others only its part.
    """
    pieces = program.stage.microbatches
    readers = 2 + needs_reference(program.stage)
    whole = _whole_parameters(program)
    rows = tuple(dict.fromkeys((*RULES["batch"], *RULES["length"])))
    found = []
    for axes, size in whole.items():
        found.append(_one(program, "parameters", axes, "all-gather", size * readers * pieces))
        found.append(_one(program, "gradients", axes, "all-reduce", size * pieces))
        part = size / math.prod(program.sizes[axis] for axis in axes)
        others = tuple(axis for axis in rows if axis not in axes and axis != NETWORK)
        found.append(_one(program, "gradients", others, "all-reduce", part * pieces))
        found.append(_one(program, "gradients", (NETWORK,), "all-reduce", part * pieces))
    return found


def gather_seconds(program: Program) -> float:
    """Of gathering every parameter once."""
    return sum(_one(program, "", axes, "all-gather", size).seconds for axes, size in _whole_parameters(program).items())


def _whole_parameters(program: Program) -> dict[tuple[str, ...], float]:
    """Axes that parameters lie in parts on -> bytes of all of them in the compute dtype, as one device uses them."""
    itemsize = jnp.dtype(program.model.compute_dtype).itemsize
    whole: dict[tuple[str, ...], float] = {}
    leaves = jax.tree.leaves(one_device(program).parameters(), is_leaf=lambda x: isinstance(x, nnx.Variable))
    for leaf in leaves:
        stored = (axis for name in leaf.get_metadata("out_sharding") if name not in SPLIT for axis in RULES[name])
        axes = tuple(axis for axis in stored if program.sizes[axis] > 1)
        whole[axes] = whole.get(axes, 0.0) + leaf.get_value().size * itemsize
    return whole


def _activations(program: Program) -> list[Traffic]:
    """Sums over tensor after attention and SwiGLU, and keys and values of whole rows over context; a reference adds its own."""
    model, (rows, tokens) = one_device(program).model, local_batch(program)
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    reference = needs_reference(program.stage)
    recomputed = program.model.remat != "none"
    residual = rows * tokens * model.embed_dim * itemsize / ways("length", program.sizes)
    # Two sums forward and two backward; of what is computed again the last is not needed.
    sums = model.num_layers * (4 + recomputed + 2 * reference)
    split = RULES["heads"]
    keys = 2 * rows * tokens * model.num_kv_heads * model.head_dim * itemsize
    gathers = model.num_layers * (1 + recomputed + reference)
    return [
        _one(program, "activations", split, "all-reduce", residual * sums),
        _one(program, "keys and values", RULES["length"], "all-gather", keys * gathers),
        _one(program, "their gradients", RULES["length"], "reduce-scatter", keys * model.num_layers),
    ]
