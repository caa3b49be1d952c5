"""Estimators of a KL divergence from sampled tokens, as functions of the log-ratio."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Tokens = Float[Array, "B T"]


def k3(log_ratio: Tokens) -> Tokens:
    """k3 estimator of KL(p ‖ q) from samples of p, given log q - log p: unbiased and never negative (Schulman 2020)."""
    return jnp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tokens], Tokens]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * jnp.square(log_ratio),
    "k3": lambda log_ratio: k3(-log_ratio),
}
"""Estimators of KL(π ‖ π_ref) at a sampled token from log π - log π_ref (Schulman 2020, joschu.net/blog/kl-approx)."""


def completion_kl(logp: Tokens, ref_logp: Tokens, mask: Tokens, kl_estimator: str) -> Float[Array, " B"]:
    """Estimated KL(π ‖ π_ref) of each completion in nats, summed over its tokens (RLOO, arXiv:2402.14740)."""
    return KL_ESTIMATORS[kl_estimator](jnp.where(mask > 0, logp - ref_logp, 0.0)).sum(1)
