"""KTO: answers that are desirable or not, each by itself, against how far the policy is from its reference."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, Float

from lm.experiment import KTO
from lm.objectives.pairs import answer_sums, mean_over
from lm.types import Mean
from lm.user_functions import is_function_name, load_function

Rewards = Float[Array, " B"]
"""beta times log π(y|x) - log π_ref(y|x) of each answer."""


def _kto(rewards: Rewards, sign: Rewards, baseline: Float[Array, ""]) -> Rewards:
    """KTO (arXiv:2402.01306, eq. 8): a desirable answer above the baseline, an undesirable one below."""
    return 1 - sigmoid(sign * (rewards - baseline))


def _apo_zero(rewards: Rewards, sign: Rewards, baseline: Float[Array, ""]) -> Rewards:
    """APO-zero (arXiv:2408.06266, eq. 7) of answers without partners: above and below 0, without a baseline."""
    return 1 - sigmoid(sign * rewards)


READS_BASELINE = frozenset({"kto"})

LOSSES: dict[str, Callable[[Rewards, Rewards, Float[Array, ""]], Rewards]] = {
    "kto": _kto,
    "apo_zero_unpaired": _apo_zero,
}


def reads_baseline(loss: str) -> bool:
    """Whether a loss is held against the batch's KL; the user's own always is given it."""
    return loss in READS_BASELINE or is_function_name(loss)


def find_loss(name: str) -> Callable[[Rewards, Rewards, Float[Array, ""]], Rewards]:
    """A row of the table, or the user's own FILE:FUNCTION."""
    return load_function(name, "loss", KTO.functions["loss"]) if is_function_name(name) else LOSSES[name]


def log_ratio_mean(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Mean:
    """Mean log-ratio of the rows that have any weight, in nats.

    On prompts with the answers of other prompts its value, or 0 where that is higher, is KTO's estimate of the KL
    divergence between policy and reference (arXiv:2402.01306, section 4.1).
    """
    return mean_over(answer_sums(logp - ref_logp, weights), _there(weights))


def kto(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    desirable: Float[Array, " B"],
    o: KTO,
    kl: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Mean over answers of a row of LOSSES. `weights` are 1 on the answers' tokens and 0 elsewhere; a row of 0 is padding.

    Args:
        desirable: 1 for a desirable answer, 0 for an undesirable one.
        kl: where `reads_baseline`, the estimate that the answers are held against, in nats, of the whole batch, without
            a gradient.
    """
    there = _there(weights)
    rewards = o.beta * answer_sums(logp - ref_logp, weights)
    losses = find_loss(o.loss)(rewards, 2 * desirable - 1, jnp.zeros(()) if kl is None else o.beta * kl)
    losses = losses * jnp.where(desirable > 0, o.desirable_weight, o.undesirable_weight)
    metrics = {
        "reward_chosen": mean_over(rewards, there * desirable),
        "reward_rejected": mean_over(rewards, there * (1 - desirable)),
    }
    if kl is not None:
        metrics["kl"] = mean_over(jnp.broadcast_to(kl, there.shape), there)
    return mean_over(losses, there), metrics


def _there(weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    return (weights.sum(-1) > 0).astype(weights.dtype)
