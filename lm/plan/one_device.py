"""One device's share of a program: the step traced with only this device's rows, heads and hidden units.

A mesh axis splits either the computation (rows, heads, hidden units, the vocabulary) or only the storage of parameters.
The first kind divides the shapes that are traced here. The second kind does not, because such a parameter is gathered
before use. The tokens of a row are not divided either, since attention reads all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lm.algorithms import algorithm_of
from lm.algorithms.state import Sizes, abstract_state
from lm.experiment import LoRA, Model, Stage, rows_per_example
from lm.optimizer import at_least_float32, make_optimizer
from lm.parallel.rules import RULES, ways
from lm.plan.program import Program, abstract_batch
from lm.plan.trace import TracedBlock, Value, block_of
from lm.plan.usage import Analysis
from lm.train_step import partition

SPLIT = ("vocab", "heads", "kv_heads", "mlp")  # dimensions of parameters that are split in computation too


def one_device(program: Program) -> Program:
    """A program whose model and vocabulary have the sizes of one device's share."""
    sizes = program.sizes

    def share(model: Model, vocab_size: int) -> Sizes:
        local = dataclasses.replace(
            model,
            num_heads=model.num_heads // ways("heads", sizes),
            num_kv_heads=model.num_kv_heads // ways("kv_heads", sizes),
            mlp_dim=model.mlp_dim // ways("mlp", sizes),
            max_logits=model.max_logits * ways("length", sizes),  # the limit is per device, but rows are traced whole
            scan_unroll=1,  # the same memory and work, faster to trace
        )
        return local, -(-vocab_size // ways("vocab", sizes))

    model, vocab_size = share(program.model, program.vocab_size)
    teacher = share(*program.teacher) if program.teacher else None
    return dataclasses.replace(program, model=model, vocab_size=vocab_size, teacher=teacher)


def local_batch(program: Program) -> tuple[int, int]:
    """Rows of an update on one device (rounded up to whole examples, such as pairs), and tokens of a whole row."""
    rows, together = program.rows // ways("batch", program.sizes), rows_per_example(program.stage)
    return -(-rows // together) * together, program.stage.seq_len


def analysis_of(program: Program) -> Analysis:
    """The settings for analysing the memory and work of this program's blocks."""
    return Analysis(
        program.topology.chip, parts(program), one_device(program).vocab_size, ways("length", program.sizes)
    )


def gradient_block(program: Program) -> tuple[TracedBlock, set[Value]]:
    """The traced gradient computation of one device's rows (without optimizer), and which of its inputs are parameters."""
    local, (rows, tokens) = one_device(program), local_batch(program)
    shapes = local.model, local.vocab_size, local.before, local.teacher
    return _gradient_block(local.stage, shapes, rows, tokens, single_device_mesh(program))


@functools.lru_cache(maxsize=64)
def _gradient_block(
    stage: Stage, shapes: tuple[Model, int, tuple[LoRA, ...], Sizes | None], rows: int, tokens: int, mesh: AbstractMesh
) -> tuple[TracedBlock, set[Value]]:
    state = abstract_state(stage, optax.identity(), *shapes)
    step = algorithm_of(stage).step(stage, optax.identity())
    with jax.sharding.use_abstract_mesh(mesh):
        block = block_of(jax.make_jaxpr(step)(state, abstract_batch(stage, rows, tokens)))
    inputs = iter(block.inputs)
    of = {name: list(itertools.islice(inputs, len(jax.tree.leaves(part)))) for name, part in vars(state).items()}
    return block, {*of["models"], *of["frozen"]}


def update_block(program: Program) -> TracedBlock:
    """The traced optimizer update, a function of (gradients, optimizer state, parameters)."""
    local = one_device(program)
    return _update_block(local.stage, local.model, local.vocab_size, local.before, local.teacher)


@functools.lru_cache(maxsize=64)
def _update_block(
    stage: Stage, model: Model, vocab_size: int, before: tuple[LoRA, ...], teacher: Sizes | None
) -> TracedBlock:
    params, _ = partition(abstract_state(stage, optax.identity(), model, vocab_size, before, teacher).models, stage)
    optimizer = make_optimizer(stage.optimizer, 1)
    gradients = jax.eval_shape(at_least_float32, params)
    return block_of(jax.make_jaxpr(optimizer.update)(gradients, jax.eval_shape(optimizer.init, params), params))


def single_device_mesh(program: Program) -> AbstractMesh:
    """An abstract mesh of one device with all axes, so that traced code takes the branches for this kind of device."""
    return whole_mesh(dataclasses.replace(program, sizes=dict.fromkeys(program.sizes, 1)))


def whole_mesh(program: Program) -> AbstractMesh:
    """An abstract mesh of all devices of a program."""
    chip = program.topology.chip
    device = AbstractDevice(device_kind=chip.kind, num_cores=1, platform=chip.platform)
    axis_types = (AxisType.Auto,) * len(program.sizes)
    return AbstractMesh(tuple(program.sizes.values()), tuple(program.sizes), axis_types, abstract_device=device)


def parts(program: Program) -> dict[tuple[int, ...], int]:
    """Sorted sizes of each parameter as it is used -> number of devices that its storage is split over.

    Stacked parameters are included both whole and as one layer. An array with the sizes of a parameter, such as a
    gradient, is assumed to be split like it. Sizes are sorted, because a gradient may be computed transposed.
    """
    found: dict[tuple[int, ...], int] = {}
    state = one_device(program).state
    for leaf in jax.tree.leaves((state.frozen, state.models), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names: tuple[str, ...] = leaf.get_metadata("out_sharding")
        shape = leaf.get_value().shape
        count = 1
        for name in names:
            count *= 1 if name in SPLIT else ways(name, program.sizes)
        shapes = [shape, shape[1:]] if names[0] == "layers" else [shape]
        if names[0] == "layers" and (size := len(program.model.period)) > 1:  # an iteration of the scan is a period
            turns = shape[0] // size
            shapes += [(turns * size, *shape[1:]), (turns, size, *shape[1:]), (size, *shape[1:])]
        found |= {tuple(sorted(sizes)): count for sizes in shapes if len(sizes) >= 2}
    return found


def cast_bytes(params: Any, program: Program) -> int:
    """Bytes of one device's share of the layers' matrices cast to the compute dtype; 0 if that is not narrower.

    The compiler casts the shares of all layers once, before the loop over layers, and keeps them until the backward loop
    ends. The gathered parameters of a layer are made from them.
    """
    dtype = jnp.dtype(program.model.compute_dtype)

    def one(leaf: Any) -> int:
        value, names = leaf.get_value(), leaf.get_metadata("out_sharding")
        if names[0] != "layers" or value.ndim < 3 or value.dtype.itemsize <= dtype.itemsize:
            return 0
        return value.size * dtype.itemsize // math.prod(ways(name, program.sizes) for name in names if name in RULES)

    return sum(map(one, jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))))


def parameter_bytes(tree: Any, program: Program, counted: set[int] | None = None) -> int:
    """Bytes on one device of a tree of parameters or of optimizer state, in which an array that occurs twice counts once.

    Args:
        counted: ids of the arrays that do not count; those of the tree are added.
    """
    counted = set() if counted is None else counted

    def one(leaf: Any) -> int:
        names = leaf.get_metadata("out_sharding") if isinstance(leaf, nnx.Variable) else ()
        count = 1
        for name in names:
            count *= ways(name, program.sizes) if name in RULES else 1
        new = [x for x in jax.tree.leaves(leaf) if id(x) not in counted]
        counted.update(map(id, new))
        return sum(x.size * x.dtype.itemsize for x in new) // count

    return sum(map(one, jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))))
