"""ORPO loss: cross-entropy of the chosen answers plus the log odds ratio of chosen to rejected; no reference."""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import log1mexp, log_sigmoid
from jaxtyping import Array, Float

from lm.experiment import ORPO
from lm.objectives.pairs import answer_means, likelihood, likelihood_scale, mean_over, present, reward_metrics
from lm.types import Mean


def log_odds(logp: Float[Array, " n"]) -> Float[Array, " n"]:
    """Log odds, log p / (1 - p), of a log-probability below 0 (arXiv:2403.07691, eq. 4)."""
    return logp - log1mexp(-logp)


def orpo(
    logp: Float[Array, "2n T"],
    weights: Float[Array, "2n T"],
    predicted: Float[Array, "2n T"],
    o: ORPO,
    *,
    nll_scale: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """ORPO loss, a mean over pairs (arXiv:2403.07691, eq. 6 and 7), and its metrics.

    Row 2i of the arrays is the chosen answer of pair i, row 2i + 1 the rejected one. The probability of an answer is the
    geometric mean over its tokens.

    Args:
        logp: log-probabilities of the tokens under the policy, in nats.
        weights: 1 on the answers' tokens, 0 elsewhere; a pair without answer tokens is padding and is ignored.
        predicted: 1 on every token but the first of a segment, prompts included; the cross-entropy covers these tokens, as in
            the authors' code.
        nll_scale: `likelihood_scale` of the whole batch, if these rows are a microbatch.
    """
    there = present(weights)
    # An empty answer has probability 1 and infinite odds; any finite number serves, since its pair is ignored.
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
