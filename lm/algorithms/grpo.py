"""The GRPO family: groups of sampled completions that carry their advantages."""

from __future__ import annotations

from lm.algorithms.algorithm import Algorithm
from lm.experiment import GRPO
from lm.rollout.environments import grpo_rollout
from lm.steps import grpo_step


def reads_reference(o: GRPO) -> bool:
    """Where its KL is penalised, in the loss or in the rollout's rewards."""
    return o.kl_coef > 0


def extra_forward_passes(o: GRPO) -> int:
    """The reference's, where its KL is in the loss."""
    return int(o.kl_coef > 0 and o.kl_in == "loss")


ALGORITHM = Algorithm(
    grpo_step, rollout=grpo_rollout, reads_reference=reads_reference, extra_forward_passes=extra_forward_passes
)
