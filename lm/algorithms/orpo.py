"""ORPO: preference pairs, cross-entropy plus an odds-ratio loss, without a reference model."""

from __future__ import annotations

from typing import Any

import optax
from jaxtyping import Array, Float

from lm.algorithms.algorithm import Algorithm
from lm.experiment import ORPO, Stage
from lm.objectives.logprobs import token_logprobs
from lm.objectives.orpo import orpo
from lm.objectives.pairs import likelihood_scale
from lm.train_step import Models, Step, make_step
from lm.types import Mean, PairBatch


def orpo_step(stage: Stage[ORPO], optimizer: optax.GradientTransformation) -> Step:
    """Training step of ORPO on preference pairs."""
    o = stage.objective

    def predicted(batch: PairBatch) -> Float[Array, "B T"]:
        """Mask of all tokens but the first of each segment."""
        return ((batch.segments > 0) & (batch.positions > 0)).astype(batch.weights.dtype)

    def loss(models: Models, frozen: Any, batch: PairBatch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch)
        mean, metrics = orpo(stats.logp, batch.weights, predicted(batch), o, nll_scale=frozen["nll_scale"])
        return mean, metrics | stats.aux

    def batch_stats(models: Models, frozen: Any, batch: PairBatch) -> dict[str, Array]:
        return {"nll_scale": likelihood_scale(batch.weights, predicted(batch))}

    return make_step(loss, stage, optimizer, batch_stats)


ALGORITHM = Algorithm(orpo_step, batch=lambda o: PairBatch)
