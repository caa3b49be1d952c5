"""Policy-gradient loss of the GRPO family: advantages × ratio level × surrogate × aggregation, chosen independently.

The four are in advantages.py, importance.py, surrogates.py and aggregation.py; the estimators of the KL penalty are in kl.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lm.experiment import GRPO
from lm.objectives.aggregation import AGGREGATIONS
from lm.objectives.cross_entropy import weighted
from lm.objectives.importance import RATIO_LEVELS, off_policy_mask, top_entropy_mask
from lm.objectives.kl import KL_ESTIMATORS, k3
from lm.objectives.surrogates import HOLDS_CORRECTION, SURROGATES, TokenSample
from lm.types import Mean

Tokens = Float[Array, "B T"]


def grpo(
    logp: Tokens,
    mask: Tokens,
    advantages: Tokens,
    o: GRPO,
    *,
    old_logp: Tokens | None = None,
    ref_logp: Tokens | None = None,
    sampler_logp: Tokens | None = None,
    correction: Tokens | None = None,
    entropy: Tokens | None = None,
    entropy_scale: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Policy-gradient loss of sampled completions and its metrics; `o.aggregation` selects the mean.

    Args:
        mask: 1 on the tokens that the policy sampled; values elsewhere are ignored.
        old_logp: log-probabilities under the old policy, the ratio's denominator; None: on-policy, ratio 1 (with a gradient).
        ref_logp: log-probabilities under the reference; kl_coef times the KL is added to the loss, after masks and clips.
        sampler_logp: log-probabilities under the sampler, if it differs from the old policy.
        correction: importance weight of each token for that difference (`sampler_correction`).
        entropy: entropy of the policy at each token, in nats.
        entropy_scale: `entropy_scale` of the whole batch, if these rows are a microbatch.
    """
    on = mask > 0
    old_logp = jax.lax.stop_gradient(logp) if old_logp is None else old_logp
    log_ratio = jnp.where(on, logp - old_logp, 0.0)
    log_weight = RATIO_LEVELS[o.ratio_level](log_ratio, mask)
    ratio = jnp.exp(log_weight)
    logp, advantages = jnp.where(on, logp, 0.0), jnp.where(on, advantages, 0.0)
    gain, low, high = SURROGATES[o.surrogate](TokenSample(log_weight, log_ratio, logp, advantages, mask, correction), o)
    per_token = -gain
    if correction is not None and o.surrogate not in HOLDS_CORRECTION:
        per_token = per_token * jnp.where(on, correction, 0.0)
    metrics = {
        "clip_low_frac": _fraction((ratio < low) & (advantages < 0), mask),
        "clip_high_frac": _fraction((ratio > high) & (advantages > 0), mask),
        "old_kl": weighted(k3(log_ratio), mask),
    }
    kept = mask
    if o.top_entropy < 1:
        assert entropy is not None
        kept = top_entropy_mask(entropy, mask, o.top_entropy)
        per_token = per_token * kept
    if o.off_policy_kl:
        near = off_policy_mask(
            logp, old_logp if sampler_logp is None else sampler_logp, advantages, mask, o.off_policy_kl
        )
        per_token = per_token * near
        metrics["off_policy_frac"] = weighted(1 - near, mask)
    if ref_logp is not None:
        kl = KL_ESTIMATORS[o.kl_estimator](jnp.where(on, logp - ref_logp, 0.0)) * (ratio if o.kl_correction else 1.0)
        per_token = per_token + o.kl_coef * kl
        metrics["kl"] = weighted(kl, mask)
    loss = AGGREGATIONS[o.aggregation](per_token, mask, o.max_new_tokens)
    if entropy is not None:
        metrics["entropy"] = weighted(entropy, mask)
        loss = entropy_bonus(loss, entropy, kept, o, entropy_scale)
    return loss, metrics


def entropy_bonus(loss: Mean, entropy: Tokens, kept: Tokens, o: GRPO, scale: Float[Array, ""] | None) -> Mean:
    """The loss minus entropy_coef times the mean entropy of the kept tokens (arXiv:1707.06347, eq. 9)."""
    if not o.entropy_coef:
        return loss
    scale = loss.weight / jnp.maximum(kept.sum(), 1) if scale is None else scale
    return Mean(loss.total - o.entropy_coef * scale * weighted(entropy, kept).total, loss.weight)


def entropy_scale(mask: Tokens, o: GRPO) -> Float[Array, ""]:
    """Factor that turns a sum of entropies, divided by the loss's weight, into their mean; computed over the whole batch."""
    return AGGREGATIONS[o.aggregation](mask, mask, o.max_new_tokens).weight / jnp.maximum(mask.sum(), 1)


def _fraction(which: Bool[Array, "B T"], mask: Tokens) -> Mean:
    return weighted(which.astype(mask.dtype), mask)
