"""Reward model: Bradley-Terry on preference pairs, with a scalar head on the language model's body."""

from __future__ import annotations

from typing import Any

import optax
from jaxtyping import PRNGKeyArray

from lm.algorithms.algorithm import Algorithm
from lm.experiment import RewardModel, Stage
from lm.model.heads import Scorer
from lm.model.transformer import Transformer
from lm.objectives.logprobs import last_scores
from lm.objectives.reward_model import reward_model
from lm.train_step import Models, Step, make_step
from lm.types import Mean, PairBatch


def models(o: RewardModel, model: Transformer, scorers: tuple[Scorer, ...], key: PRNGKeyArray | None) -> Models:
    """A scorer with a new head on the first `layers` layers of the language model."""
    return {"reward": Scorer(model, key, o.layers)}


def reward_step(stage: Stage[RewardModel], optimizer: optax.GradientTransformation) -> Step:
    """Training step of a reward model on preference pairs (Bradley-Terry)."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: PairBatch) -> tuple[Mean, dict[str, Mean]]:
        margins = batch.margins[0::2] if o.margins else None
        scores, aux = last_scores(models["reward"], batch)
        mean, metrics = reward_model(scores, batch.weights, o, margins=margins, is_tie=batch.ties[0::2])
        return mean, metrics | aux

    return make_step(loss, stage, optimizer)


ALGORITHM = Algorithm(reward_step, models, batch=lambda o: PairBatch)
