"""Importance ratios of sampled completions: how far the policy is from the one that sampled them, and what follows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.experiment import GRPO, PPO

Tokens = Float[Array, "B T"]


# ---- ratio levels: (log π - log π_old of each token, 0 off the mask; mask) -> log of the importance ratio ----------


def token_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """GRPO (arXiv:2402.03300, eq. 3): each token has its own ratio."""
    return log_ratio


def sequence_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """GSPO (arXiv:2507.18071, eq. 7): every token has the geometric mean of its completion's ratios."""
    return completion_mean(log_ratio, mask)


def product_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """RLOO (arXiv:2402.14740): every token has the product of its completion's ratios."""
    return jnp.broadcast_to((log_ratio * mask).sum(1, keepdims=True), log_ratio.shape)


RATIO_LEVELS: dict[str, Callable[[Tokens, Tokens], Tokens]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "product": product_ratio,
}


def completion_mean(values: Tokens, mask: Tokens) -> Tokens:
    """The mean of each completion's values over its tokens, at every place of its row."""
    lengths = jnp.maximum(mask.sum(1, keepdims=True), 1)
    return jnp.broadcast_to((values * mask).sum(1, keepdims=True) / lengths, values.shape)


# ---- the sampler is not the trainer --------------------------------------------------------------------------------


def sampler_correction(old_logp: Tokens, sampler_logp: Tokens, mask: Tokens, o: GRPO | PPO) -> Tokens:
    """Importance ratio of the trainer's old policy to the sampler that drew the tokens, kept within bounds.

    At tis_level "sequence" all tokens of a row have the product of its ratios. tis_mode "truncate" caps the ratio at
    tis_clip (TIS, Yao et al. 2025, fengyao.notion.site/off-policy-rl); "mask" drops tokens whose ratio is not within
    [tis_low, tis_clip] (IcePop, arXiv:2510.18855).
    """
    log_ratio = jnp.where(mask > 0, old_logp - sampler_logp, 0.0)
    if o.tis_level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(1, keepdims=True), log_ratio.shape)
    ratio = jnp.exp(log_ratio)
    if o.tis_mode == "truncate":
        return jnp.minimum(ratio, o.tis_clip)
    return jnp.where((ratio >= o.tis_low) & (ratio <= o.tis_clip), ratio, 0.0)


def off_policy_mask(logp: Tokens, sampler_logp: Tokens, advantages: Tokens, mask: Tokens, max_kl: float) -> Tokens:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556, section 3.1): 1 for completions that are kept.

    A completion with a negative advantage is dropped where the mean over its tokens of log π_sampler - log π is more
    than max_kl, in nats.
    """
    drift = jax.lax.stop_gradient(jnp.where(mask > 0, sampler_logp - logp, 0.0))
    return ((advantages >= 0) | (completion_mean(drift, mask) <= max_kl)).astype(mask.dtype)


def top_entropy_mask(entropy: Tokens, mask: Tokens, share: float) -> Tokens:
    """High-entropy tokens only ("Beyond the 80/20 rule", arXiv:2506.01939): 1 for those that are kept.

    Kept is the given share of all tokens on the mask, those with the highest entropy of the policy: the threshold is a
    quantile (with linear interpolation) over all rows, which must therefore be the whole batch.
    """
    threshold = jnp.nanquantile(jnp.where(mask > 0, jax.lax.stop_gradient(entropy), jnp.nan), 1 - share)
    return mask * (entropy >= threshold)
