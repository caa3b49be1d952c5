"""Reward model loss: Bradley-Terry on preference pairs, with margins, ties and centering."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from lm.experiment import RewardModel
from lm.objectives.pairs import Pairs, mean_over, present
from lm.types import Mean


def _split(gap: Pairs, width: float) -> Pairs:
    """Loss of a tie as half a win for each answer; smallest where the scores are equal."""
    return -0.5 * (log_sigmoid(gap) + log_sigmoid(-gap))


def _rao_kupper_tie(gap: Pairs, width: float) -> Pairs:
    """Loss of a tie as a third outcome, P(tie) = (θ² - 1) · P(first) · P(second) with θ = e^width.

    Source: Rao and Kupper 1967, doi:10.1080/01621459.1967.10482901.
    """
    return -(log_sigmoid(gap - width) + log_sigmoid(-gap - width) + jnp.log(jnp.expm1(2 * width)))


TIES: dict[str, Callable[[Pairs, float], Pairs]] = {"split": _split, "rao_kupper": _rao_kupper_tie}
"""RewardModel.ties -> loss of a tied pair, a function of the score gap and tie_width."""


def reward_model(
    scores: Float[Array, " 2n"],
    weights: Float[Array, "2n T"],
    o: RewardModel,
    *,
    margins: Pairs | None = None,
    is_tie: Pairs | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Bradley-Terry loss and metrics: mean over pairs of -log σ(gap - margin) + center_coef · (sum of the two scores)².

    Sources: arXiv:1706.03741, eq. 1; margin: arXiv:2307.09288, eq. 2; centering: arXiv:2312.09244, eq. 2. With ties
    "rao_kupper" a win requires a gap of tie_width (Rao and Kupper 1967).

    Args:
        scores: score 2i is that of the chosen answer of pair i, score 2i + 1 that of the rejected one.
        weights: 1 on the answers' tokens, 0 elsewhere; a pair without any is padding and is ignored.
        margins: required score gap of each pair.
        is_tie: 1 for pairs without a preferred answer; ties "drop" ignores them.
    """
    there = present(weights)
    chosen, rejected = scores[0::2], scores[1::2]
    gap = chosen - rejected
    asked = jnp.zeros_like(gap) if margins is None else margins
    losses = -log_sigmoid(gap - asked - (o.tie_width if o.ties == "rao_kupper" else 0.0))
    decided = there
    if is_tie is not None:
        decided = there * (1 - is_tie)
        there = decided if o.ties == "drop" else there
        losses = losses if o.ties == "drop" else jnp.where(is_tie > 0, TIES[o.ties](gap, o.tie_width), losses)
    if o.center_coef:
        losses = losses + o.center_coef * jnp.square(chosen + rejected)
    metrics = {
        "reward_accuracy": mean_over((gap > 0).astype(gap.dtype), decided),
        "reward_margin": mean_over(gap, decided),
        "reward_chosen": mean_over(chosen, decided),
        "reward_rejected": mean_over(rejected, decided),
    }
    return mean_over(losses, there), metrics
