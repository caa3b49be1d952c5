"""Initial state of a stage with the models of its algorithm, real or as shapes, and the FLOPs of its updates."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from lm import open_weights
from lm.algorithms import algorithm_of
from lm.changes import stored_experiment
from lm.experiment import LoRA, Model, Stage, from_dict, reward_names
from lm.model.flops import forward_flops_per_token, update_flops_per_token
from lm.model.heads import Scorer
from lm.model.lora import adapted, freeze_adapter
from lm.model.quantised import set_base
from lm.model.transformer import Transformer
from lm.train_step import TrainState, initial_state, partition

Sizes = tuple[Model, int]
"""Config of a language model, and the number of rows of its embedding."""


def first_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    model: Transformer,
    scorers: tuple[Scorer, ...] = (),
    key: PRNGKeyArray | None = None,
    teacher: Transformer | None = None,
) -> TrainState:
    """The initial training state of a stage, whose adapter is put on; what does not train shares its arrays with the models given.

    Raises:
        UserError: a pattern of `stage.trainable` or `stage.lora.targets` matches nothing, or nothing trains.
    """
    algorithm, o = algorithm_of(stage), stage.objective
    model, scorers = freeze_adapter(model), tuple(map(freeze_adapter, scorers))
    model = set_base(model, stage.lora.base)
    frozen: dict[str, Any] = {"reference": model} if algorithm.reads_reference(o) and not stage.lora.rank else {}
    if algorithm.keeps_scorers and scorers:
        frozen["scorers"] = scorers
    if teacher is not None:
        frozen["teacher"] = freeze_adapter(teacher)
    models = algorithm.models(o, model, scorers, key)
    models = {
        role: adapted(one, stage, jax.random.key(0) if key is None else key, role) for role, one in models.items()
    }
    return initial_state(stage, optimizer, models, algorithm.carry(o), frozen)


def teacher_sizes(stage: Stage, config: Model, vocab_size: int) -> Sizes | None:
    """Config and vocabulary of the model that a stage learns from, from its metadata; None without one.

    Args:
        config, vocab_size: those of the stage's own model, which earlier stages share.

    Raises:
        UserError: the open weights or the run do not exist.
    """
    name = stage.objective.teacher_name
    if open_weights.names_weights(name):
        found = open_weights.experiment_on(name, stage.seq_len, config)
        return found.model, found.tokenizer.vocab_size
    run = name.rpartition(":")[0]
    if run:
        experiment = from_dict(stored_experiment(Path(run)))
        return experiment.model, experiment.tokenizer.vocab_size if experiment.init else vocab_size
    return (config, vocab_size) if name else None


def abstract_model(config: Model, vocab_size: int) -> Transformer:
    """A language model of this config, its parameters as shapes."""
    return jax.eval_shape(lambda: Transformer(config, vocab_size, jax.random.key(0)))


def abstract_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    config: Model,
    vocab_size: int,
    before: tuple[LoRA, ...] = (),
    teacher: Sizes | None = None,
) -> TrainState:
    """The first state of a stage, as shapes; reward models that it reads are taken to be as large as its language model.

    Parameters that are the same array, such as an adapter's base in policy and critic, are the same object.

    Args:
        before: adapters of earlier stages, whose factors the model keeps.
        teacher: sizes of the model that the stage learns from; None: as `teacher_sizes` finds them.

    Raises:
        UserError: a pattern of `stage.trainable` matches no parameter, or nothing trains.
    """
    teacher = teacher or teacher_sizes(stage, config, vocab_size)
    state = _without_optimizer(stage, config, vocab_size, before, teacher)
    trained, _ = partition(state.models, stage)
    return dataclasses.replace(state, opt_state=jax.eval_shape(optimizer.init, trained))


@functools.lru_cache(maxsize=64)
def _without_optimizer(
    stage: Stage, config: Model, vocab_size: int, before: tuple[LoRA, ...], teacher: Sizes | None
) -> TrainState:
    """`abstract_state` without optimizer state, cached because a plan needs it several times and tracing is slow."""

    def make(model: Transformer, bodies: list[Transformer], learnt_from: Transformer | None) -> TrainState:
        for lora in before:
            earlier = dataclasses.replace(stage, lora=lora)
            model = freeze_adapter(adapted(model, earlier, jax.random.key(0), "policy"))
        scorers = tuple(Scorer(body, None) for body in bodies)
        return first_state(stage, optax.identity(), model, scorers, teacher=learnt_from)

    bodies = [abstract_model(config, vocab_size) for _ in reward_names(stage)]
    inputs = abstract_model(config, vocab_size), bodies, abstract_model(*teacher) if teacher else None
    traced, state = jax.make_jaxpr(make, return_shape=True)(*inputs)
    leaves, tree = jax.tree.flatten(state)
    known: dict[int, Any] = {}
    return jax.tree.unflatten(
        tree, [known.setdefault(id(of), one) for of, one in zip(traced.jaxpr.outvars, leaves, strict=True)]
    )


def flops_per_token(stage: Stage, model: Model, vocab_size: int, before: tuple[LoRA, ...] = ()) -> float:
    """Operations that an update of the stage does for each token of its rows, by what of its models trains.

    Args:
        before: adapters of earlier stages, as for `abstract_state`.
    """
    models = abstract_state(stage, optax.identity(), model, vocab_size, before).models
    trained, _ = partition(models, stage)
    passes = algorithm_of(stage).extra_forward_passes(stage.objective)
    read = teacher_sizes(stage, model, vocab_size) or (model, vocab_size)
    others = passes * forward_flops_per_token(*read, stage.seq_len)
    return update_flops_per_token(models, trained, stage.seq_len) + others
