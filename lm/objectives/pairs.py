"""Helpers shared by the losses on preference pairs: sums over an answer, means over pairs, and a likelihood term."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.types import Mean

Pairs = Float[Array, " n"]
"""One number per pair. In arrays over rows, row 2i is the chosen answer of pair i and row 2i + 1 the rejected one."""


def answer_sums(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    """Weighted sum of each row; values of weight 0 are ignored, even NaN."""
    return jnp.where(weights == 0, 0.0, values * weights).sum(-1)


def answer_means(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    """Weighted mean of each row; 0 for a row without weight."""
    return answer_sums(values, weights) / jnp.maximum(weights.sum(-1), 1)


def present(weights: Float[Array, "2n T"]) -> Pairs:
    """1 for a pair with answer tokens, 0 for padding."""
    lengths = weights.sum(-1)
    return (lengths[0::2] + lengths[1::2] > 0).astype(weights.dtype)


def mean_over(values: Pairs, there: Pairs) -> Mean:
    """Mean of `values` over the pairs that are `there`."""
    return Mean((values * there).sum(), there.sum())


def likelihood(logp: Float[Array, "2n T"], predicted: Float[Array, "2n T"]) -> Mean:
    """Cross-entropy of the chosen rows in nats, a mean over all their `predicted` tokens."""
    return Mean(-answer_sums(logp[0::2], predicted[0::2]).sum(), predicted[0::2].sum())


def likelihood_scale(weights: Float[Array, "2n T"], predicted: Float[Array, "2n T"]) -> Float[Array, ""]:
    """Ratio of pairs to `predicted` chosen tokens of a batch: the factor by which the total of `likelihood` joins a pair loss.

    The sum is then divided by the number of pairs. The ratio is computed over the whole batch, since one per microbatch would
    give its tokens other weights.
    """
    return present(weights).sum() / jnp.maximum(predicted[0::2].sum(), 1)


def reward_metrics(chosen: Pairs, rejected: Pairs, there: Pairs) -> dict[str, Mean]:
    """Metrics of the answers' rewards: means, margin, and the fraction of pairs whose chosen reward is higher."""
    return {
        "reward_accuracy": mean_over((chosen > rejected).astype(there.dtype), there),
        "reward_margin": mean_over(chosen - rejected, there),
        "reward_chosen": mean_over(chosen, there),
        "reward_rejected": mean_over(rejected, there),
    }
