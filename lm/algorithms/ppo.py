"""PPO: sampled answers, scored whole; policy and critic are trained together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from lm.algorithms.algorithm import Algorithm, Models
from lm.experiment import PPO
from lm.model.scorer import ScoreHead, Scorer
from lm.model.transformer import Transformer
from lm.rollout.experience import ppo_rollout
from lm.steps import ppo_step


def models(o: PPO, model: Transformer, scorers: tuple[Scorer, ...], key: PRNGKeyArray | None) -> Models:
    """Policy and critic; the critic is a copy of the first reward model, or a head whose values are all 0."""
    if o.critic == "head":
        return {"policy": model, "critic": ScoreHead(model.config, None)}
    return {"policy": model, "critic": jax.tree.map(jnp.copy, scorers[0] if scorers else Scorer(model, None))}


def carry(o: PPO) -> dict[str, Array]:
    """The weight of the KL in rewards, which follows the KL where it has a target."""
    return {"kl_coef": jnp.float32(o.kl_coef)}


ALGORITHM = Algorithm(
    ppo_step,
    models,
    rollout=ppo_rollout,
    reads_reference=lambda o: True,  # in the rollout: the step finds its log-probabilities in the batch
    carry=carry,
    keeps_scorers=True,
    trained_model_counts=lambda o: (1, int(o.critic == "separate")),
)
