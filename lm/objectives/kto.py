"""KTO losses: single answers labelled good or bad, relative to a baseline, the KL of the policy to the reference."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, Float

from lm.experiment import KTO
from lm.objectives.own_loss import own_loss
from lm.objectives.pairs import answer_sums, mean_over
from lm.types import Mean
from lm.user_functions import is_function_name

Rewards = Float[Array, " B"]
"""Implicit reward of each answer: beta times (log π(y|x) - log π_ref(y|x))."""


def _kto(rewards: Rewards, sign: Rewards, baseline: Float[Array, ""]) -> Rewards:
    """KTO (arXiv:2402.01306, eq. 8): rewards of good answers above the baseline, of bad answers below it."""
    return 1 - sigmoid(sign * (rewards - baseline))


def _apo_zero(rewards: Rewards, sign: Rewards, baseline: Float[Array, ""]) -> Rewards:
    """APO-zero (arXiv:2408.06266, eq. 7) on single answers: rewards of good answers above 0, of bad answers below."""
    return 1 - sigmoid(sign * rewards)


READS_BASELINE = frozenset({"kto"})

LOSSES: dict[str, Callable[[Rewards, Rewards, Float[Array, ""]], Rewards]] = {
    "kto": _kto,
    "apo_zero_unpaired": _apo_zero,
}


def reads_baseline(loss: str) -> bool:
    """Whether a loss uses the batch's KL as baseline; a user's own function always receives it."""
    return loss in READS_BASELINE or is_function_name(loss)


def find_loss(name: str) -> Callable[[Rewards, Rewards, Float[Array, ""]], Rewards]:
    """The loss of that name, from LOSSES or the user's FILE:FUNCTION."""
    return own_loss(name, "loss", KTO.functions["loss"]) if is_function_name(name) else LOSSES[name]


def log_ratio_mean(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Mean:
    """Mean log-ratio of policy to reference over the rows with any weight, in nats.

    On mismatched rows (a prompt with the answer of another) it is KTO's estimate of the KL divergence of the policy to the
    reference, which is then clipped at 0 (arXiv:2402.01306, section 4.1).
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
    """KTO-family loss, a mean over answers, and its metrics.

    Args:
        logp: log-probabilities of the tokens under the policy, in nats.
        ref_logp: the same under the reference.
        weights: 1 on the answers' tokens, 0 elsewhere; a row of zeros is padding and is ignored.
        desirable: 1 for a good answer, 0 for a bad one.
        kl: baseline: estimated KL over the whole batch, in nats, without a gradient; None if the loss has no baseline.
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
