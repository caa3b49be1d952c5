"""A reward model: Bradley-Terry on pairs; the language model's body with a scalar head."""

from __future__ import annotations

from jaxtyping import PRNGKeyArray

from lm.algorithms.algorithm import Algorithm, Models
from lm.experiment import RewardModel
from lm.model.scorer import Scorer
from lm.model.transformer import Transformer
from lm.steps import reward_step


def models(o: RewardModel, model: Transformer, scorers: tuple[Scorer, ...], key: PRNGKeyArray | None) -> Models:
    """The scorer, its first `layers` layers those of the language model, with a new head."""
    return {"reward": Scorer(model, key, o.layers)}


ALGORITHM = Algorithm(reward_step, models, trained_model_counts=lambda o: (0, 1))
