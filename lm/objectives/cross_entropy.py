"""Cross-entropy over weighted tokens, for pretraining and SFT, which differ only in the weights."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.experiment import SFT, Pretrain
from lm.objectives.logprobs import TokenStats
from lm.types import Mean


def nll(logp: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of each token."""
    return -logp


def dft(logp: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Dynamic fine-tuning (arXiv:2508.05629): negative log-likelihood weighted by the token's probability (no gradient)."""
    return -jax.lax.stop_gradient(jnp.exp(logp)) * logp


LOSSES: dict[str, Callable[[Float[Array, "B T"]], Float[Array, "B T"]]] = {"nll": nll, "dft": dft}


def cross_entropy(
    stats: TokenStats,
    weights: Float[Array, "B T"],
    o: Pretrain | SFT,
) -> tuple[Mean, dict[str, Mean]]:
    """Cross-entropy loss and metrics: weighted mean over tokens of (1 - ε)·loss(logp) - ε·mean_logp + z_loss·lse², in nats.

    z_loss keeps the log-normaliser near 0 (PaLM, arXiv:2204.02311, section 5). label_smoothing ε mixes the target
    with the uniform distribution (arXiv:1512.00567, section 7) and needs stats.mean_logp.
    """
    per_token = LOSSES[o.loss](stats.logp)
    if o.label_smoothing:
        assert stats.mean_logp is not None, "label smoothing needs want_mean_logp=True"
        per_token = (1 - o.label_smoothing) * per_token - o.label_smoothing * stats.mean_logp
    if o.z_loss:
        per_token = per_token + o.z_loss * jnp.square(stats.lse)
    metrics = {"token_accuracy": weighted(stats.correct, weights)}
    if stats.entropy is not None:
        metrics["entropy"] = weighted(stats.entropy, weights)
    return weighted(per_token, weights), metrics


def weighted(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Mean:
    """Weighted mean over tokens; values of weight 0 are ignored, even NaN."""
    return Mean(jnp.where(weights == 0, 0.0, values * weights).sum(), weights.sum())
