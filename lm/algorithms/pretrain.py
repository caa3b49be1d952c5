"""Pretraining: next-token cross-entropy on every token of the text."""

from __future__ import annotations

from typing import Any

import optax

from lm.algorithms.algorithm import Algorithm
from lm.experiment import SFT, Pretrain, Stage
from lm.objectives.cross_entropy import cross_entropy
from lm.objectives.logprobs import token_logprobs
from lm.train_step import Loss, Models, Step, make_step
from lm.types import Mean, TokenBatch


def pretrain_step(stage: Stage[Pretrain], optimizer: optax.GradientTransformation) -> Step:
    """Training step of pretraining: next-token cross-entropy on every token of the text."""
    return make_step(cross_entropy_loss(stage), stage, optimizer)


def cross_entropy_loss(stage: Stage[Pretrain] | Stage[SFT]) -> Loss:
    """Cross-entropy over the weighted tokens of a batch, shared by pretraining and SFT."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: TokenBatch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch, want_mean_logp=o.label_smoothing > 0)
        mean, metrics = cross_entropy(stats, batch.weights, o)
        return mean, metrics | stats.aux

    return loss


ALGORITHM = Algorithm(pretrain_step)
