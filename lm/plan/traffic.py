"""Collectives of an update by mesh axis: bytes that devices send each other, and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm.algorithms import algorithm_of
from lm.model.flops import trains_in_layers
from lm.model.heads import policy_of
from lm.parallel.rules import RULES, ways
from lm.plan.kernels import RING
from lm.plan.one_device import local_batch, one_device
from lm.plan.program import Program
from lm.plan.usage import Usage

NETWORK = "slices"  # the mesh axis over the data-centre network


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
    """All collectives of an update, except sums of a few numbers.

    Args:
        usage: usage of the gradient computation, for the bytes that are gathered and summed.
    """
    found = [*_parameters(program, usage), *_activations(program)]
    return [item for item in found if item.devices > 1 and item.bytes]


def collective(program: Program, what: str, axes: tuple[str, ...], kind: str, size: float) -> Traffic:
    """A collective of `size` bytes over those of the axes that are larger than 1."""
    chip, axes = program.topology.chip, tuple(axis for axis in axes if program.sizes[axis] > 1)
    devices = math.prod(program.sizes[axis] for axis in axes)
    rate = chip.network if NETWORK in axes else chip.interconnect
    return Traffic(what, axes, kind, devices, size, size * RING[kind](devices) / rate if devices > 1 else 0.0)


def _parameters(program: Program, usage: Usage) -> list[Traffic]:
    """Gathers of parameters, and sums of the gradients of what trains over all axes that split rows or tokens, in the compute dtype.

    Over the axes that parameters are sharded on, a device sums whole gradients (the compiler makes it an all-reduce and
    keeps its shard). Over the other axes it sums only its shard, once per microbatch.
    """
    pieces = program.stage.microbatches
    itemsize = jnp.dtype(program.model.compute_dtype).itemsize
    leaves = jax.tree.leaves(program.trained(), is_leaf=lambda x: isinstance(x, nnx.Variable))
    part = sum(
        leaf.get_value().size
        * itemsize
        / math.prod(ways(name, program.sizes) for name in leaf.get_metadata("out_sharding"))
        for leaf in leaves
        if leaf.get_value() is not None
    )
    others = [axis for axis in (*RULES["batch"], *RULES["length"]) if axis not in RULES["embed"]]
    inside = tuple(axis for axis in others if axis != NETWORK)
    return [
        collective(program, "parameters", RULES["embed"], "all-gather", usage.gathered),
        collective(program, "gradients", RULES["embed"], "all-reduce", usage.summed),
        collective(program, "gradients", inside, "all-reduce", part * pieces),
        collective(program, "gradients", (NETWORK,), "all-reduce", part * pieces),
    ]


def gather_seconds(program: Program, usage: Usage) -> float:
    """Seconds of gathering parameters."""
    return collective(program, "", RULES["embed"], "all-gather", usage.gathered).seconds


def _activations(program: Program) -> list[Traffic]:
    """Sums over `tensor` after attention and MLP, and gathers of keys and values over `context`, of all forward passes."""
    model, (rows, tokens) = one_device(program).model, local_batch(program)
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    others = algorithm_of(program.stage).extra_forward_passes(program.stage.objective)
    backward = trains_in_layers(policy_of(program.trained()))
    recomputed = backward and program.model.remat != "none"
    residual = rows * tokens * model.embed_dim * itemsize / ways("length", program.sizes)
    # Two sums forward and two backward; recomputation needs only the first.
    sums = model.num_layers * (2 + 2 * backward + recomputed + 2 * others)
    split = RULES["heads"]
    keys = 2 * rows * tokens * model.num_kv_heads * model.head_dim * itemsize
    gathers = model.num_layers * (1 + recomputed + others)
    return [
        collective(program, "activations", split, "all-reduce", residual * sums),
        collective(program, "keys and values", RULES["length"], "all-gather", keys * gathers),
        collective(program, "their gradients", RULES["length"], "reduce-scatter", keys * model.num_layers * backward),
    ]
