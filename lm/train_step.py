"""Builds a pure training step from a loss; defines the training state and which parameters train.

`step(state, batch) -> (state, metrics)` is a pure function, independent of files, meshes, clocks and algorithms: `make_step`
turns any loss into one, and `jax.jit` with shardings compiles it for one device or thousands.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lm.experiment import Stage, UserError
from lm.model.lora import OWN
from lm.model.parameter import leaf_name
from lm.optimizer import apply_updates, at_least_float32, global_norm
from lm.parallel.rules import constrain
from lm.types import Mean, Penalty, pytree

Models = dict[str, Any]
"""Models by their role: `policy`, `critic`, `reward`."""
Metrics = dict[str, Float[Array, ""]]
Tree = TypeVar("Tree")

Loss = Callable[[Models, Any, Any], tuple[Mean, dict[str, Mean]]]
"""(models, frozen, batch) -> what is minimised and what is reported, neither divided yet."""
Weights = dict[str, Float[Array, ""]]
BatchStats = Callable[[Models, Any, Any], dict[str, Array]]
"""(models, frozen, batch) -> numbers of the whole batch that the loss of a microbatch needs, by name."""

EXCLUDES = "!"
"""How a pattern of `Stage.trainable` begins that excludes parameters."""
PATHS_SHOWN = 3


@pytree
class TrainState:
    """State of training: input and output of a step.

    `step` counts optimizer updates. `models` are those with a gradient, by role; `Stage.trainable` selects their trained
    parameters, and `opt_state` covers only these. `carry` is the algorithm's own state from one step to the next, by
    name. `frozen` is read-only (for instance {"reference": model}) and passes through unchanged.
    """

    step: Int[Array, ""]
    models: Models
    opt_state: Any
    carry: dict[str, Array]
    frozen: dict[str, Any]


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


# ---- trained parameters ----------------------------------------------------------------------------------------------


def is_trainable(name: str, stage: Stage) -> bool:
    """Whether a stage trains a parameter: `Stage.trainable` selects it among all, or with an adapter among factors and heads."""
    return _may_train(name, stage) and _selected(name, stage.trainable)


def _may_train(name: str, stage: Stage) -> bool:
    return any(fnmatch.fnmatchcase(name, one) for one in OWN) if stage.lora.rank else "/earlier/" not in name


def _selected(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches a pattern (or there are none), and no excluding pattern."""
    excluded = [pattern.removeprefix(EXCLUDES) for pattern in patterns if pattern.startswith(EXCLUDES)]
    included = [pattern for pattern in patterns if not pattern.startswith(EXCLUDES)] or ["*"]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in included) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in excluded
    )


def partition(models: Tree, stage: Stage) -> tuple[Tree, Tree]:
    """Split the models of a stage into two trees, trained and fixed parameters; each has None in place of the other's leaves.

    An optimizer initialised with the first tree has moments and master weights only for the trained parameters.
    """

    def part(wanted: bool) -> Tree:
        def one(path: tuple[Any, ...], leaf: Any) -> Any:
            return leaf if is_trainable(leaf_name(path), stage) == wanted else None

        return jax.tree_util.tree_map_with_path(one, models)

    return part(True), part(False)


def combine(trained: Tree, fixed: Tree) -> Tree:
    """The inverse of `partition`: merge trained and fixed parameters."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda x: x is None)


def check_trainable(stage: Stage, models: Models) -> None:
    """Check that every pattern of `Stage.trainable` matches a parameter and that something trains.

    Args:
        models: may be abstract.

    Raises:
        UserError: otherwise; names the pattern, and paths similar to it.
    """
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(models)]
    names = [name for name in names if _may_train(name, stage)]
    what = f"parameters that lora.rank {stage.lora.rank} trains in" if stage.lora.rank else "parameters of"
    for pattern in stage.trainable:
        if not fnmatch.filter(names, pattern.removeprefix(EXCLUDES)):
            near = difflib.get_close_matches(pattern.strip("!*"), names, PATHS_SHOWN, cutoff=0.3) or names[:PATHS_SHOWN]
            raise UserError(
                f"{stage.name}.trainable has {pattern!r}, which matches none of the {len(names)} {what} this stage; "
                f"near it are {', '.join(near)}"
            )
    if not any(is_trainable(name, stage) for name in names):
        raise UserError(
            f"{stage.name}.trainable is {', '.join(map(repr, stage.trainable))}, which leaves nothing to train; its "
            f"parameters are {', '.join(names[:PATHS_SHOWN])}{' …' if len(names) > PATHS_SHOWN else ''}"
        )


def initial_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    models: Models,
    carry: dict[str, Array],
    frozen: dict[str, Any],
) -> TrainState:
    """The state before the first step, with the optimizer state of the trained parameters, which are copied.

    Raises:
        UserError: a pattern of `stage.trainable` matches no parameter, or nothing trains.
    """
    check_trainable(stage, models)
    trained, fixed = partition(models, stage)
    models = combine(jax.tree.map(jnp.copy, trained), fixed)
    return TrainState(jnp.int32(0), models, optimizer.init(trained), carry, frozen)


def split_state(state: TrainState, stage: Stage) -> tuple[TrainState, Any]:
    """What a step of the stage changes of its state, and what it only reads."""
    trained, fixed = partition(state.models, stage)
    return dataclasses.replace(state, models=trained, frozen={}), (fixed, state.frozen)


def join_state(changing: TrainState, read: Any) -> TrainState:
    """The inverse of `split_state`."""
    fixed, frozen = read
    return dataclasses.replace(changing, models=combine(changing.models, fixed), frozen=frozen)


# ---- the step --------------------------------------------------------------------------------------------------------


def make_step(
    loss: Loss, stage: Stage, optimizer: optax.GradientTransformation, batch_stats: BatchStats | None = None
) -> Step:
    """A training step from a loss: gradient (summed over microbatches), division by the summed weight, clipping, update.

    The results of `batch_stats` on the whole batch, before it is split, are added to the loss's argument `frozen`, without a
    gradient. Every `Penalty` among the metrics, which layers of the model report, is added to the loss here.
    """

    def total(
        trained: Models, fixed: Models, frozen: Any, batch: Any, weights: Weights | None = None
    ) -> tuple[Array, tuple[Mean, dict[str, Mean]]]:
        mean, metrics = loss(combine(trained, fixed), frozen, batch)
        mean = with_penalties(mean, metrics, weights or weights_of(mean, metrics))
        return mean.total, (mean, metrics)

    def gradient(
        trained: Models, fixed: Models, frozen: Any, batch: Any, weights: Weights | None = None
    ) -> tuple[Models, dict[str, Mean]]:
        grads, (mean, metrics) = jax.grad(total, has_aux=True)(trained, fixed, frozen, batch, weights)
        # One pass gives gradients in the parameters' dtype; everything after it, beginning with their sums, is in float32.
        return at_least_float32(grads), {"loss": mean, **metrics}

    def whole_weights(trained: Models, fixed: Models, frozen: Any, pieces: Any) -> Weights:
        """Weights of the whole batch. They depend on no parameter, so XLA removes the forward pass in this function."""

        def of_piece(piece: Any) -> Weights:
            return weights_of(*loss(combine(trained, fixed), frozen, piece))

        return jax.tree.map(lambda x: x.sum(0), jax.lax.map(of_piece, pieces))

    def summed(trained: Models, fixed: Models, frozen: Any, batch: Any) -> tuple[Models, dict[str, Mean]]:
        if stage.microbatches == 1:
            return gradient(trained, fixed, frozen, batch)
        pieces = cut(batch, stage.microbatches)
        start = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, trained, fixed, frozen, jax.tree.map(lambda x: x[0], pieces)),
        )
        weights = whole_weights(trained, fixed, frozen, pieces) if penalties(start[1]) else None

        def accumulate(sums: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(trained, fixed, frozen, piece, weights)), None

        return jax.lax.scan(accumulate, start, pieces)[0]

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        frozen = state.frozen | batch_stats(state.models, state.frozen, batch) if batch_stats else state.frozen
        trained, fixed = partition(state.models, stage)
        grads, sums = summed(trained, fixed, frozen, batch)
        weight = jnp.maximum(sums["loss"].weight, 1e-30)
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        models = combine(apply_updates(trained, updates, opt_state), fixed)
        metrics = {name: mean.value() for name, mean in sums.items()}
        metrics["grad_norm"] = global_norm(grads)
        return TrainState(state.step + 1, models, opt_state, state.carry, state.frozen), metrics

    return step


def penalties(metrics: dict[str, Mean]) -> dict[str, Penalty]:
    """The penalties among a loss's metrics, which are also minimised."""
    return {name: mean for name, mean in metrics.items() if isinstance(mean, Penalty)}


def weights_of(loss: Mean, metrics: dict[str, Mean]) -> Weights:
    """Weights of a loss (under "") and of its penalties, by name."""
    return {"": loss.weight} | {name: mean.weight for name, mean in penalties(metrics).items()}


def with_penalties(loss: Mean, metrics: dict[str, Mean], weights: Weights) -> Mean:
    """The loss plus coef times the mean of each penalty over the whole batch, given the batch's weights."""
    total = loss.total
    for name, penalty in penalties(metrics).items():
        total = total + penalty.coef * penalty.total * weights[""] / jnp.maximum(weights[name], 1e-30)
    return Mean(total, loss.weight)


def cut(batch: Tree, pieces: int) -> Tree:
    """Reshape a batch to [pieces, B / pieces, …], each piece spread over all devices."""
    return jax.tree.map(lambda x: constrain(x.reshape(pieces, -1, *x.shape[1:]), None, "batch"), batch)
