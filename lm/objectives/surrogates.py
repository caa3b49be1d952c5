"""Surrogate objectives of the GRPO family, maximised at each token of a sampled completion; one function per paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lm.experiment import GRPO
from lm.objectives.importance import LARGEST_LOG, completion_mean, saturating_ratio

Tokens = Float[Array, "B T"]


class TokenSample(NamedTuple):
    """Inputs of a surrogate at every token; each is 0 where the mask is 0."""

    log_weight: Tokens  # log π - log π_old at the ratio level
    log_ratio: Tokens  # log π - log π_old of the token itself
    logp: Tokens  # log π
    advantages: Tokens
    mask: Tokens
    correction: Tokens | None  # weight of the token where the sampler is not the old policy

    def ratio(self, saturated: Bool[Array, "B T"] | bool = False) -> Tokens:
        """π / π_old at the ratio level; `saturated` is where a very large one gives the same gain as a large one."""
        return saturating_ratio(self.log_weight, saturated)


class Gain(NamedTuple):
    """Value of a surrogate at each token, and the bounds of the ratio within which it has a gradient."""

    gain: Tokens
    low: float = 0.0
    high: float = math.inf


def clipped(x: TokenSample, o: GRPO) -> Gain:
    """min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A), PPO's pessimistic clip (arXiv:1707.06347, eq. 7).

    Two bounds are DAPO's (arXiv:2503.14476, section 3.1). delta, if not 0, also caps r where the advantage is negative
    (two-sided clip, INTELLECT-2, arXiv:2505.07291, section 3.4).
    """
    low, high = 1 - o.clip_low, 1 + o.clip_high
    ratio = x.ratio(saturated=(x.advantages >= 0) | (o.delta > 0))
    capped = jnp.minimum(ratio, o.delta) if o.delta else ratio
    return Gain(jnp.minimum(capped * x.advantages, jnp.clip(ratio, low, high) * x.advantages), low, high)


def cispo(x: TokenSample, o: GRPO) -> Gain:
    """sg[min(r, clip_high)]·A·log π, CISPO (arXiv:2506.13585, eq. 4 and 5): clip_high is the cap itself, not 1 + clip_high."""
    weight = jax.lax.stop_gradient(jnp.minimum(x.ratio(), o.clip_high))
    return Gain(weight * x.advantages * x.logp, 0.0, o.clip_high)


def sapo(x: TokenSample, o: GRPO) -> Gain:
    """4/τ·σ(τ·(r - 1))·A, SAPO (arXiv:2511.20347, eq. 5 and 6): a soft clip, where τ depends on the advantage's sign."""
    tau = jnp.where(x.advantages > 0, o.sapo_tau_pos, o.sapo_tau_neg)
    return Gain(jax.nn.sigmoid(tau * (x.ratio(saturated=True) - 1)) * 4 / tau * x.advantages)


def gmpo(x: TokenSample, o: GRPO) -> Gain:
    """(Π clip(r, e^-clip_low, e^clip_high))^(1/length)·A, GMPO (arXiv:2507.20673): a geometric mean of clipped ratios.

    As in PPO each token's clip is pessimistic; the bounds apply to log r.
    """
    sign = jnp.sign(x.advantages)
    held = sign * jnp.minimum(sign * x.log_ratio, sign * jnp.clip(x.log_ratio, -o.clip_low, o.clip_high))
    geometric = jnp.exp(completion_mean(held, x.mask))
    return Gain(geometric * x.advantages, math.exp(-o.clip_low), math.exp(o.clip_high))


# VESPO's log-weight is between SMALLEST_LOG and LARGEST_LOG, a token's log-ratio within ±LARGEST_LOG.
SMALLEST_LOG = math.log(1e-8)


def vespo(x: TokenSample, o: GRPO) -> Gain:
    """sg[e^λ·w^k·e^(-λ·w)]·A·log π, VESPO (arXiv:2602.10693, eq. 20), where w is the product of the completion's ratios.

    k and λ depend on the advantage's sign; the weight is 1 at w = 1. The importance correction, if any, is a factor of w.
    """
    log_ratio = jnp.clip(x.log_ratio, -LARGEST_LOG, LARGEST_LOG)
    if x.correction is not None:
        log_ratio += jnp.clip(jnp.log(jnp.where(x.mask > 0, x.correction, 1.0)), SMALLEST_LOG, LARGEST_LOG)
    log_w = jnp.clip((log_ratio * x.mask).sum(1, keepdims=True), SMALLEST_LOG, LARGEST_LOG)
    positive = x.advantages >= 0
    k = jnp.where(positive, o.vespo_k_pos, o.vespo_k_neg)
    lam = jnp.where(positive, o.vespo_lambda_pos, o.vespo_lambda_neg)
    weight = jax.lax.stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))
    return Gain(weight * x.advantages * x.logp)


SURROGATES: dict[str, Callable[[TokenSample, GRPO], Gain]] = {
    "clipped": clipped,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
}

HOLDS_CORRECTION = frozenset({"vespo"})
"""Surrogates that apply the importance correction themselves; the others' gain is multiplied by it."""
