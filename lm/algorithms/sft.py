"""Supervised fine-tuning: next-token cross-entropy on the assistant's turns."""

from __future__ import annotations

import optax

from lm.algorithms.algorithm import Algorithm
from lm.algorithms.pretrain import cross_entropy_loss
from lm.experiment import SFT, Stage
from lm.train_step import Step, make_step


def sft_step(stage: Stage[SFT], optimizer: optax.GradientTransformation) -> Step:
    """Training step of SFT: next-token cross-entropy on the tokens that the batch's weights select."""
    return make_step(cross_entropy_loss(stage), stage, optimizer)


ALGORITHM = Algorithm(sft_step)
