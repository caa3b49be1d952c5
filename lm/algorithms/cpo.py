"""The CPO family: preference pairs, without a reference model."""

from __future__ import annotations

from typing import Any

import optax
from jaxtyping import Array

from lm.algorithms.algorithm import Algorithm
from lm.experiment import CPO, Stage
from lm.objectives.cpo import cpo
from lm.objectives.logprobs import token_logprobs
from lm.objectives.pairs import likelihood_scale
from lm.train_step import Models, Step, make_step
from lm.types import Mean, PairBatch


def cpo_step(stage: Stage[CPO], optimizer: optax.GradientTransformation) -> Step:
    """Training step of CPO, SimPO and AlphaPO on preference pairs."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: PairBatch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch)
        mean, metrics = cpo(stats.logp, batch.weights, o, nll_scale=frozen["nll_scale"])
        return mean, metrics | stats.aux

    def batch_stats(models: Models, frozen: Any, batch: PairBatch) -> dict[str, Array]:
        return {"nll_scale": likelihood_scale(batch.weights, batch.weights)}

    return make_step(loss, stage, optimizer, batch_stats)


ALGORITHM = Algorithm(cpo_step, batch=lambda o: PairBatch)
