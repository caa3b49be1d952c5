"""What devices send each other in an update, in bytes by mesh axis, and how long the wires are busy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm.algorithms.table import algorithm_of
from lm.parallel.rules import RULES, ways
from lm.plan.hlo_work import RING
from lm.plan.one_device import local_batch, one_device
from lm.plan.program import Program
from lm.plan.usage import Usage

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


def traffic(program: Program, usage: Usage) -> list[Traffic]:
    """Every collective of an update, but for sums of a few numbers.

    Args:
        usage: of the gradient, which says how much is gathered and summed.
    """
    found = [*_parameters(program, usage), *_activations(program)]
    return [item for item in found if item.devices > 1 and item.bytes]


def _one(program: Program, what: str, axes: tuple[str, ...], kind: str, size: float) -> Traffic:
    chip, axes = program.topology.chip, tuple(axis for axis in axes if program.sizes[axis] > 1)
    devices = math.prod(program.sizes[axis] for axis in axes)
    rate = chip.network if NETWORK in axes else chip.interconnect
    return Traffic(what, axes, kind, devices, size, size * RING[kind](devices) / rate if devices > 1 else 0.0)


def _parameters(program: Program, usage: Usage) -> list[Traffic]:
    """Parameters are gathered; gradients are summed over all that split rows or tokens, in the compute dtype.

    A device sums whole gradients over the axes that its parameters lie in parts on (the compiler makes an all-reduce of
    it and keeps a part), and over the others only its part, once a microbatch.
    """
    pieces = program.stage.microbatches
    itemsize = jnp.dtype(program.model.compute_dtype).itemsize
    leaves = jax.tree.leaves(program.state().models, is_leaf=lambda x: isinstance(x, nnx.Variable))
    part = sum(
        leaf.get_value().size
        * itemsize
        / math.prod(ways(name, program.sizes) for name in leaf.get_metadata("out_sharding"))
        for leaf in leaves
    )
    others = [axis for axis in (*RULES["batch"], *RULES["length"]) if axis not in RULES["embed"]]
    inside = tuple(axis for axis in others if axis != NETWORK)
    return [
        _one(program, "parameters", RULES["embed"], "all-gather", usage.gathered),
        _one(program, "gradients", RULES["embed"], "all-reduce", usage.summed),
        _one(program, "gradients", inside, "all-reduce", part * pieces),
        _one(program, "gradients", (NETWORK,), "all-reduce", part * pieces),
    ]


def gather_seconds(program: Program, usage: Usage) -> float:
    """Of what is gathered."""
    return _one(program, "", RULES["embed"], "all-gather", usage.gathered).seconds


def _activations(program: Program) -> list[Traffic]:
    """Sums over tensor after attention and SwiGLU, and keys and values of whole rows over context; other passes add their own."""
    model, (rows, tokens) = one_device(program).model, local_batch(program)
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    others = algorithm_of(program.stage).extra_forward_passes(program.stage.objective)
    recomputed = program.model.remat != "none"
    residual = rows * tokens * model.embed_dim * itemsize / ways("length", program.sizes)
    # Two sums forward and two backward; of what is computed again the last is not needed.
    sums = model.num_layers * (4 + recomputed + 2 * others)
    split = RULES["heads"]
    keys = 2 * rows * tokens * model.num_kv_heads * model.head_dim * itemsize
    gathers = model.num_layers * (1 + recomputed + others)
    return [
        _one(program, "activations", split, "all-reduce", residual * sums),
        _one(program, "keys and values", RULES["length"], "all-gather", keys * gathers),
        _one(program, "their gradients", RULES["length"], "reduce-scatter", keys * model.num_layers),
    ]
