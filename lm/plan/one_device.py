"""One device's share of a program: the same step, traced with its own rows, heads and hidden units.

An axis of the mesh splits either what a device computes (rows, heads, hidden units, the vocabulary) or only where
parameters lie between uses. The first kind divides the shapes that are traced here; the second kind is left whole, because
such a parameter is gathered before it is used. Tokens of a row are left whole as well, since attention reads them all.
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

from lm.algorithms.table import algorithm_of
from lm.experiment import Model, Stage, rows_per_example
from lm.model.transformer import Transformer
from lm.optimizer import at_least_float32, make_optimizer
from lm.parallel.rules import RULES, ways
from lm.plan.program import Program, abstract_batch, abstract_state
from lm.plan.trace import TracedBlock, Value, block_of
from lm.plan.usage import Analysis
from lm.train_step import partition

SPLIT = ("vocab", "heads", "kv_heads", "mlp")  # dimensions of parameters that are used in parts


def one_device(program: Program) -> Program:
    """The program of one device, alone."""
    model, sizes = program.model, program.sizes
    local = dataclasses.replace(
        model,
        num_heads=model.num_heads // ways("heads", sizes),
        num_kv_heads=model.num_kv_heads // ways("kv_heads", sizes),
        mlp_dim=model.mlp_dim // ways("mlp", sizes),
        max_logits=model.max_logits
        * ways("length", sizes),  # a bound for a device's part of the rows that are traced whole
        scan_unroll=1,  # saves and computes the same, and is traced sooner
    )
    return dataclasses.replace(program, model=local, vocab_size=program.vocab_size // ways("vocab", sizes))


def local_batch(program: Program) -> tuple[int, int]:
    """Rows of an update that one device works on, alone or with others, and tokens of a whole row; half a pair is a pair."""
    rows, together = program.rows // ways("batch", program.sizes), rows_per_example(program.stage)
    return -(-rows // together) * together, program.stage.seq_len


def analysis_of(program: Program) -> Analysis:
    """How blocks of this program are analysed."""
    return Analysis(
        program.topology.chip, parts(program), one_device(program).vocab_size, ways("length", program.sizes)
    )


def gradient_block(program: Program) -> tuple[TracedBlock, set[Value]]:
    """The step of one device, but for the optimizer: the gradient of its rows; and those of its inputs that are parameters."""
    local, (rows, tokens) = one_device(program), local_batch(program)
    return _gradient_block(local.stage, local.model, local.vocab_size, rows, tokens, lone_mesh(program))


@functools.lru_cache(maxsize=64)
def _gradient_block(
    stage: Stage, model: Model, vocab_size: int, rows: int, tokens: int, mesh: AbstractMesh
) -> tuple[TracedBlock, set[Value]]:
    model_shape = jax.eval_shape(lambda: Transformer(model, vocab_size, jax.random.key(0)))
    state = abstract_state(stage, optax.identity(), model_shape)
    step = algorithm_of(stage).step(stage, optax.identity())
    with jax.sharding.use_abstract_mesh(mesh):
        block = block_of(jax.make_jaxpr(step)(state, abstract_batch(stage, rows, tokens)))
    inputs = iter(block.inputs)
    of = {name: list(itertools.islice(inputs, len(jax.tree.leaves(part)))) for name, part in vars(state).items()}
    return block, {*of["models"], *of["frozen"]}


def update_block(program: Program) -> TracedBlock:
    """What the optimizer does with (gradients, its state, parameters)."""
    local = one_device(program)
    return _update_block(local.stage, local.model, local.vocab_size)


@functools.lru_cache(maxsize=64)
def _update_block(stage: Stage, model: Model, vocab_size: int) -> TracedBlock:
    model_shape = jax.eval_shape(lambda: Transformer(model, vocab_size, jax.random.key(0)))
    params, _ = partition(abstract_state(stage, optax.identity(), model_shape).models, stage.trainable)
    optimizer = make_optimizer(stage.optimizer, 1)
    gradients = jax.eval_shape(at_least_float32, params)
    return block_of(jax.make_jaxpr(optimizer.update)(gradients, jax.eval_shape(optimizer.init, params), params))


def lone_mesh(program: Program) -> AbstractMesh:
    """A mesh of one device of the topology's kind, with all axes: the code that is traced chooses what that device likes."""
    device = AbstractDevice(device_kind=program.topology.chip.kind, num_cores=1, platform="tpu")
    axes = tuple(program.sizes)
    return AbstractMesh((1,) * len(axes), axes, (AxisType.Auto,) * len(axes), abstract_device=device)


def parts(program: Program) -> dict[tuple[int, ...], int]:
    """Sizes of a parameter as it is used, sorted -> in how many parts it lies between uses.

    Stacked parameters are in it as wholes and as those of one layer. What has such sizes, a gradient for instance, lies
    as the parameter does. Sorted, because products may give a gradient transposed.
    """
    found: dict[tuple[int, ...], int] = {}
    params = one_device(program).state().models
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names: tuple[str, ...] = leaf.get_metadata("out_sharding")
        shape = leaf.get_value().shape
        count = 1
        for name in names:
            count *= 1 if name in SPLIT else ways(name, program.sizes)
        shapes = [shape, shape[1:]] if names[0] == "layers" else [shape]
        if names[0] == "layers" and (size := len(program.model.period)) > 1:  # the scan takes a period of layers a turn
            turns = shape[0] // size
            shapes += [(turns * size, *shape[1:]), (turns, size, *shape[1:]), (size, *shape[1:])]
        found |= {tuple(sorted(sizes)): count for sizes in shapes if len(sizes) >= 2}
    return found


def cast_bytes(params: Any, program: Program) -> int:
    """Bytes of what one device has of the layers' matrices in the dtype of the computation, where that is narrower.

    The compiler casts all layers' shares once, before the loop over layers, and keeps them until the backward loop has
    ended; what it gathers of a layer is made from them.
    """
    dtype = jnp.dtype(program.model.compute_dtype)

    def one(leaf: Any) -> int:
        value, names = leaf.get_value(), leaf.get_metadata("out_sharding")
        if names[0] != "layers" or value.ndim < 3 or value.dtype.itemsize <= dtype.itemsize:
            return 0
        return value.size * dtype.itemsize // math.prod(ways(name, program.sizes) for name in names if name in RULES)

    return sum(map(one, jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))))


def parameter_bytes(tree: Any, program: Program) -> int:
    """Bytes of a tree of parameters, or of what an optimizer keeps of them, on one device."""

    def one(leaf: Any) -> int:
        names = leaf.get_metadata("out_sharding") if isinstance(leaf, nnx.Variable) else ()
        count = 1
        for name in names:
            count *= ways(name, program.sizes) if name in RULES else 1
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf)) // count

    return sum(map(one, jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))))
