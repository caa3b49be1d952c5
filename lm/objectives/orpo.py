"""ORPO: cross-entropy on chosen texts, and the odds of the chosen answer against the rejected one; no reference."""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import log1mexp, log_sigmoid
from jaxtyping import Array, Float

from lm.experiment import ORPO
from lm.objectives.pairs import answer_means, likelihood, likelihood_scale, mean_over, present, reward_metrics
from lm.types import Mean


def log_odds(logp: Float[Array, " n"]) -> Float[Array, " n"]:
    """log p / (1 - p) of probabilities below 1 (arXiv:2403.07691, eq. 4)."""
    return logp - log1mexp(-logp)


def orpo(
    logp: Float[Array, "2n T"],
    weights: Float[Array, "2n T"],
    predicted: Float[Array, "2n T"],
    o: ORPO,
    *,
    nll_scale: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Mean over pairs (arXiv:2403.07691, eq. 6 and 7), where p of an answer is its tokens' geometric mean.

    Row 2i of the arrays is pair i's chosen answer, row 2i + 1 its rejected; `weights` are 1 on the answers' tokens and
    0 elsewhere, `predicted` 1 on every token that something stands before, prompts too: the cross-entropy is of these,
    as in the authors' code. A pair without any answer token is padding and counts for nothing.

    Args:
        nll_scale: `likelihood_scale` of the whole batch where these are a piece of it.
    """
    there = present(weights)
    # An empty answer has probability 1 and infinite odds: its row gets another number, which counts for nothing.
    means = jnp.where(weights.sum(-1) > 0, answer_means(logp, weights), -1.0)
    chosen, rejected = means[0::2], means[1::2]
    ratio = log_odds(chosen) - log_odds(rejected)
    odds = mean_over(-log_sigmoid(ratio), there)
    nll = likelihood(logp, predicted)
    scale = likelihood_scale(weights, predicted) if nll_scale is None else nll_scale
    metrics = reward_metrics(o.beta * chosen, o.beta * rejected, there) | {
        "nll": nll,
        "log_odds": mean_over(ratio, there),
    }
    return Mean(o.beta * odds.total + scale * nll.total, odds.weight), metrics
