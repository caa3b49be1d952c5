"""The GRPO family: groups of sampled completions that carry their advantages."""

from __future__ import annotations

from lm.algorithms.algorithm import Algorithm
from lm.experiment import GRPO
from lm.rollout.environments import grpo_rollout
from lm.steps import grpo_step


def reads_reference(o: GRPO) -> bool:
    """Where its KL is penalised."""
    return o.kl_coef > 0


ALGORITHM = Algorithm(
    grpo_step, rollout=grpo_rollout, reads_reference=reads_reference, extra_forward_passes=reads_reference
)
