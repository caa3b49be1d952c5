"""What the losses on preference pairs share: sums over an answer, means over pairs, and a likelihood term among them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.types import Mean

Pairs = Float[Array, " n"]
"""One number a pair. Of arrays over rows, row 2i is pair i's chosen answer and row 2i + 1 its rejected."""


def answer_sums(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    """Weighted sum of each row; what has weight 0 counts for nothing, whatever it is."""
    return jnp.where(weights == 0, 0.0, values * weights).sum(-1)


def answer_means(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    """Weighted mean of each row, and 0 of a row without weight."""
    return answer_sums(values, weights) / jnp.maximum(weights.sum(-1), 1)


def present(weights: Float[Array, "2n T"]) -> Pairs:
    """1 for a pair that has any answer token; one without is padding and counts for nothing."""
    lengths = weights.sum(-1)
    return (lengths[0::2] + lengths[1::2] > 0).astype(weights.dtype)


def mean_over(values: Pairs, there: Pairs) -> Mean:
    """Mean of `values` over the pairs that are `there`."""
    return Mean((values * there).sum(), there.sum())


def likelihood(logp: Float[Array, "2n T"], predicted: Float[Array, "2n T"]) -> Mean:
    """Cross-entropy over the `predicted` tokens of the chosen rows, in nats; the mean is over all of them together."""
    return Mean(-answer_sums(logp[0::2], predicted[0::2]).sum(), predicted[0::2].sum())


def likelihood_scale(weights: Float[Array, "2n T"], predicted: Float[Array, "2n T"]) -> Float[Array, ""]:
    """Pairs of a batch for each of its `predicted` chosen tokens.

    Times this, the total of `likelihood` adds to a total over pairs, and both are divided by the number of pairs. It is
    a number of the whole batch: a piece of one (a microbatch) that used its own would weigh its tokens otherwise.
    """
    return present(weights).sum() / jnp.maximum(predicted[0::2].sum(), 1)


def reward_metrics(chosen: Pairs, rejected: Pairs, there: Pairs) -> dict[str, Mean]:
    """What is reported of the answers' rewards, and how often the chosen one has the higher."""
    return {
        "reward_accuracy": mean_over((chosen > rejected).astype(there.dtype), there),
        "reward_margin": mean_over(chosen - rejected, there),
        "reward_chosen": mean_over(chosen, there),
        "reward_rejected": mean_over(rejected, there),
    }
