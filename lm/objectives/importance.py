"""Importance ratios of sampled completions: ratio levels, correction of the sampler mismatch, and masks derived from them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lm.experiment import GRPO, PPO

Tokens = Float[Array, "B T"]

# The log-ratio beyond which a bounded surrogate is constant: above the logarithm of every bound in the config.
LARGEST_LOG = 20.0


def saturating_ratio(log_ratio: Tokens, saturated: Bool[Array, "B T"] | bool) -> Tokens:
    """exp(log_ratio); where `saturated`, at most e^LARGEST_LOG, since an exp that overflows has the gradient 0 · inf."""
    return jnp.exp(jnp.where(saturated, jnp.minimum(log_ratio, LARGEST_LOG), log_ratio))


# ---- ratio levels: (log π - log π_old of each token, 0 outside the mask; mask) -> log importance ratio -------------


def token_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """Token-level ratio: each token has its own (GRPO, arXiv:2402.03300, eq. 3)."""
    return log_ratio


def sequence_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """Sequence-level ratio: geometric mean of the completion's token ratios (GSPO, arXiv:2507.18071, eq. 7)."""
    return completion_mean(log_ratio, mask)


def product_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """Product of the completion's token ratios, the ratio of the whole completion (RLOO, arXiv:2402.14740)."""
    return jnp.broadcast_to((log_ratio * mask).sum(1, keepdims=True), log_ratio.shape)


RATIO_LEVELS: dict[str, Callable[[Tokens, Tokens], Tokens]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "product": product_ratio,
}


def completion_mean(values: Tokens, mask: Tokens) -> Tokens:
    """Mean of each row's values over its masked-in tokens, broadcast to all tokens of the row."""
    lengths = jnp.maximum(mask.sum(1, keepdims=True), 1)
    return jnp.broadcast_to((values * mask).sum(1, keepdims=True) / lengths, values.shape)


# ---- mismatch of sampler and trainer -------------------------------------------------------------------------------


def truncated(ratio: Tokens, o: GRPO | PPO) -> Tokens:
    """Weights above tis_clip are tis_clip (TIS, Yao et al. 2025, fengyao.notion.site/off-policy-rl)."""
    return jnp.minimum(ratio, o.tis_clip)


def masked(ratio: Tokens, o: GRPO | PPO) -> Tokens:
    """Weights outside [tis_low, tis_clip] are 0 (IcePop, arXiv:2510.18855; AReaL's decoupled objective with tis_low 0)."""
    return jnp.where((ratio >= o.tis_low) & (ratio <= o.tis_clip), ratio, 0.0)


CORRECTIONS: dict[str, Callable[[Tokens, GRPO | PPO], Tokens]] = {"truncate": truncated, "mask": masked}


def sampler_correction(old_logp: Tokens, sampler_logp: Tokens, mask: Tokens, o: GRPO | PPO) -> Tokens:
    """Bounded importance weight π_old / π_sampler of each token, where the sampler has other numerics or older weights.

    The log-probabilities of a token are those of the weights that sampled it, whatever their version. At tis_level "sequence"
    every token of a row has the product of the row's ratios. tis_mode chooses the bound.
    """
    log_ratio = jnp.where(mask > 0, old_logp - sampler_logp, 0.0)
    if o.tis_level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(1, keepdims=True), log_ratio.shape)
    return CORRECTIONS[o.tis_mode](jnp.exp(log_ratio), o)


def off_policy_mask(logp: Tokens, sampler_logp: Tokens, advantages: Tokens, mask: Tokens, max_kl: float) -> Tokens:
    """Off-policy sequence mask (DeepSeek-V3.2, arXiv:2512.02556, section 3.1): 1 on the tokens of completions that are kept.

    A completion with a negative advantage is dropped if the mean over its tokens of log π_sampler - log π exceeds max_kl nats.
    """
    drift = jax.lax.stop_gradient(jnp.where(mask > 0, sampler_logp - logp, 0.0))
    return ((advantages >= 0) | (completion_mean(drift, mask) <= max_kl)).astype(mask.dtype)


def top_entropy_mask(entropy: Tokens, mask: Tokens, share: float) -> Tokens:
    """Mask of the tokens with the highest entropy, a fraction `share` of all ("Beyond the 80/20 rule", arXiv:2506.01939).

    The threshold is a quantile over all rows, which must therefore be the whole batch. Without interpolation, whose rounding
    could put it above tokens of equal entropy, such as the first ones of a group's completions.
    """
    known = jnp.where(mask > 0, jax.lax.stop_gradient(entropy), jnp.nan)
    threshold = jnp.nanquantile(known, 1 - share, method="higher")
    return mask * (entropy >= threshold)
