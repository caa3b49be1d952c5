"""Table of algorithms by the class of their config, and the initial state of a stage."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from lm.algorithms import cpo, dpo, grpo, kto, orpo, ppo, pretrain, reward_model, sft
from lm.algorithms.algorithm import Algorithm
from lm.experiment import CPO, DPO, GRPO, KTO, ORPO, PPO, SFT, LoRA, Model, Pretrain, RewardModel, Stage, reward_names
from lm.model.flops import forward_flops_per_token, update_flops_per_token
from lm.model.heads import Scorer
from lm.model.lora import adapted, freeze_adapter
from lm.model.quantised import set_base
from lm.model.transformer import Transformer
from lm.train_step import TrainState, initial_state, partition

ALGORITHMS: dict[type, Algorithm] = {
    Pretrain: pretrain.ALGORITHM,
    SFT: sft.ALGORITHM,
    DPO: dpo.ALGORITHM,
    CPO: cpo.ALGORITHM,
    ORPO: orpo.ALGORITHM,
    KTO: kto.ALGORITHM,
    RewardModel: reward_model.ALGORITHM,
    PPO: ppo.ALGORITHM,
    GRPO: grpo.ALGORITHM,
}


def algorithm_of(stage: Stage) -> Algorithm:
    """The algorithm of a stage that trains."""
    return ALGORITHMS[type(stage.objective)]


def first_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    model: Transformer,
    scorers: tuple[Scorer, ...] = (),
    key: PRNGKeyArray | None = None,
) -> TrainState:
    """The initial training state of a stage, whose adapter is put on; what does not train shares its arrays with the models given.

    Raises:
        UserError: a pattern of `stage.trainable` or `stage.lora.targets` matches nothing, or nothing trains.
    """
    algorithm, o = algorithm_of(stage), stage.objective
    model, scorers = freeze_adapter(model), tuple(map(freeze_adapter, scorers))
    model = set_base(model, stage.lora.base)
    frozen: dict[str, Any] = {"reference": model} if algorithm.reads_reference(o) and not stage.lora.rank else {}
    if algorithm.keeps_scorers:
        frozen["scorers"] = scorers
    models = algorithm.models(o, model, scorers, key)
    models = {
        role: adapted(one, stage, jax.random.key(0) if key is None else key, role) for role, one in models.items()
    }
    return initial_state(stage, optimizer, models, algorithm.carry(o), frozen)


def abstract_model(config: Model, vocab_size: int) -> Transformer:
    """A language model of this config, its parameters as shapes."""
    return jax.eval_shape(lambda: Transformer(config, vocab_size, jax.random.key(0)))


def abstract_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    config: Model,
    vocab_size: int,
    before: tuple[LoRA, ...] = (),
) -> TrainState:
    """The first state of a stage, as shapes; reward models that it reads are taken to be as large as its language model.

    Parameters that are the same array, such as an adapter's base in policy and critic, are the same object.

    Args:
        before: adapters of earlier stages, whose factors the model keeps.

    Raises:
        UserError: a pattern of `stage.trainable` matches no parameter, or nothing trains.
    """
    state = _without_optimizer(stage, config, vocab_size, before)
    trained, _ = partition(state.models, stage)
    return dataclasses.replace(state, opt_state=jax.eval_shape(optimizer.init, trained))


@functools.lru_cache(maxsize=64)
def _without_optimizer(stage: Stage, config: Model, vocab_size: int, before: tuple[LoRA, ...]) -> TrainState:
    """`abstract_state` without optimizer state, cached because a plan needs it several times and tracing is slow."""

    def make(model: Transformer, bodies: list[Transformer]) -> TrainState:
        for lora in before:
            earlier = dataclasses.replace(stage, lora=lora)
            model = freeze_adapter(adapted(model, earlier, jax.random.key(0), "policy"))
        return first_state(stage, optax.identity(), model, tuple(Scorer(body, None) for body in bodies))

    bodies = [abstract_model(config, vocab_size) for _ in reward_names(stage)]
    traced, state = jax.make_jaxpr(make, return_shape=True)(abstract_model(config, vocab_size), bodies)
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
    others = passes * forward_flops_per_token(model, vocab_size, stage.seq_len)
    return update_flops_per_token(models, trained, stage.seq_len) + others
