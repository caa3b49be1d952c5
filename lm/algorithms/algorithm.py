"""The `Algorithm` value: everything about a training algorithm that needs jax, as functions of its objective's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PRNGKeyArray

from lm.experiment import Stage
from lm.model.heads import Scorer
from lm.model.lora import without_adapter
from lm.model.transformer import Transformer
from lm.rollout.engine import Engine
from lm.rollout.episodes import Sampled, Tasks, sample_trajectories
from lm.rollout.trajectory import Rollout
from lm.train_step import Models, Step, TrainState
from lm.types import TokenBatch

Sampler = Callable[[Engine, Mapping[str, Any], Tasks, Stage[Any], int, PRNGKeyArray, NamedSharding], Sampled]
RolloutMaker = Callable[[Sampled, TrainState, Tasks, Stage[Any], int, PRNGKeyArray, NamedSharding], Rollout]


def policy_alone(o: Any, model: Transformer, scorers: tuple[Scorer, ...], key: PRNGKeyArray | None) -> Models:
    """Trained models of an algorithm that trains only the policy."""
    return {"policy": model}


def reference_of(models: Models, frozen: dict[str, Any]) -> Transformer:
    """The model that entered the stage: `frozen["reference"]`, or of a policy with an adapter the model with it off."""
    return frozen["reference"] if "reference" in frozen else without_adapter(models["policy"])


def sample_once(
    engine: Engine,
    frozen: Mapping[str, Any],
    tasks: Tasks,
    stage: Stage,
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Sampled:
    """Sample the completions of each prompt of the step, and reward them."""
    o: Any = stage.objective
    return sample_trajectories(
        engine, tasks, step, key,
        max_new_tokens=o.max_new_tokens, temperature=o.temperature, group_size=o.completions_per_prompt,
    )  # fmt: skip


def no_rollout(
    sampled: Sampled, state: TrainState, tasks: Tasks, stage: Stage, step: int, key: PRNGKeyArray, place: NamedSharding
) -> Rollout:
    """Rollout of an algorithm that does not sample: raises TypeError."""
    raise TypeError(f"{type(stage.objective).__name__} samples nothing")


@dataclass(frozen=True)
class Algorithm:
    """A training algorithm: its step, models, rollout and costs; what needs no jax is in its config class (`lm/config/objective.py`).

    step: the pure training step of a stage, which `jax.jit` compiles.
    models: the models with a gradient, by role, from the config, the model that enters the stage, the reward models that it
        reads and the random key of what is new; may be traced.
    reads_reference: whether the step reads the model as it was before the stage, `reference_of`.
    carry: what it remembers from one step to the next beside the models, at the start.
    keeps_scorers: whether the reward models that a stage reads are frozen in its state, under `frozen["scorers"]`.
    sample: samples and rewards the completions of a step, where the objective samples; of the state it reads `frozen` alone.
    rollout: makes the batches of a step's updates from these completions and the state before the step.
    batch: the type of its batches.
    extra_forward_passes: forward passes over a batch's rows of which no gradient is taken.
    """

    step: Callable[[Stage[Any], optax.GradientTransformation], Step]
    models: Callable[[Any, Transformer, tuple[Scorer, ...], PRNGKeyArray | None], Models] = policy_alone
    reads_reference: Callable[[Any], bool] = lambda o: False
    carry: Callable[[Any], dict[str, Array]] = lambda o: {}
    keeps_scorers: bool = False
    sample: Sampler = sample_once
    rollout: RolloutMaker = no_rollout
    batch: Callable[[Any], type[TokenBatch]] = lambda o: TokenBatch
    extra_forward_passes: Callable[[Any], int] = lambda o: 0
