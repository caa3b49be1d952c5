"""PPO on whole answers: rewards of tokens, advantages and returns of a rollout, and the clipped loss of policy and values."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.objectives.cross_entropy import weighted
from lm.objectives.grpo import k3
from lm.types import Mean

Tokens = Float[Array, "B T"]
Rows = Float[Array, " B"]
Scalar = Float[Array, ""]

EPS = 1e-8  # added to a variance before dividing


KL_ESTIMATORS: dict[str, Callable[[Tokens], Tokens]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * jnp.square(log_ratio),
    "k3": lambda log_ratio: k3(-log_ratio),
}
"""Of KL(π ‖ π_ref) at a sampled token, from log π - log π_ref (Schulman 2020, joschu.net/blog/kl-approx)."""


# ---- what a rollout is worth ---------------------------------------------------------------------------------------


def token_rewards(
    scores: Rows, logp: Tokens, ref_logp: Tokens, mask: Tokens, kl_coef: Scalar | float, kl_estimator: str = "k1"
) -> Tokens:
    """An answer's score at its last token, less kl_coef times the KL at each (arXiv:1909.08593, eq. 2). 0 off the mask."""
    kl = KL_ESTIMATORS[kl_estimator](jnp.where(mask > 0, logp - ref_logp, 0.0))
    place = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask > 0, place, -1), axis=1, keepdims=True)
    return jnp.where(place == last, scores[:, None], 0.0) - kl_coef * kl


def gae(rewards: Tokens, values: Tokens, gamma: float, lam: float) -> Tokens:
    """Generalised advantage estimates (arXiv:1506.02438, eq. 16): Σ (γλ)^k δ, δ = r + γ·V(next) - V.

    values[b, t] judges the state before token t; both arrays are 0 where nothing follows.
    """
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    delta = rewards + gamma * following - values

    def back(later: Rows, here: Rows) -> tuple[Rows, Rows]:
        found = here + gamma * lam * later
        return found, found

    _, advantages = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
    return advantages.T


def whiten(x: Tokens, mask: Tokens, keep_mean: bool = False) -> Tokens:
    """Mean 0 (or as it is) and variance 1 over the mask, unbiased; 0 off it."""
    count = mask.sum()
    mean = (x * mask).sum() / jnp.maximum(count, 1)
    variance = (jnp.square(x - mean) * mask).sum() / jnp.maximum(count - 1, 1)
    white = (x - mean) * jax.lax.rsqrt(variance + EPS)
    return jnp.where(mask > 0, white + mean if keep_mean else white, 0.0)


def experience(
    rewards: Tokens,
    values: Tokens,
    mask: Tokens,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
) -> tuple[Tokens, Tokens]:
    """(advantages, whitened over the rollout; returns, which are not) of token rewards and of values, both 0 off the mask."""
    if whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages = gae(rewards, values, gamma, lam)
    return whiten(advantages, mask), advantages + values


def explained_variance(values: Tokens, returns: Tokens, mask: Tokens) -> Scalar:
    """1 - Var(returns - values) / Var(returns): 1 where the critic knows all, 0 where it knows no more than the mean."""

    def variance(x: Tokens) -> Scalar:
        mean = (x * mask).sum() / jnp.maximum(mask.sum(), 1)
        return (jnp.square(x - mean) * mask).sum()

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), EPS)


def adaptive_kl_coef(kl_coef: Scalar, kl: Scalar, *, target: float, answers: float, horizon: int) -> Scalar:
    """The coefficient after so many answers whose mean KL was `kl` (arXiv:1909.08593, section 2.2: e, clipped to ±0.2)."""
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * answers / horizon)


# ---- the loss ------------------------------------------------------------------------------------------------------


def ppo(
    logp: Tokens,
    values: Tokens,
    mask: Tokens,
    advantages: Tokens,
    returns: Tokens,
    old_logp: Tokens,
    old_values: Tokens,
    *,
    correction: Tokens | None = None,
    entropy: Tokens | None = None,
    value_mask: Tokens | None = None,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
) -> tuple[Mean, dict[str, Mean]]:
    """Mean over tokens of the clipped surrogate (arXiv:1707.06347, eq. 7) and of value_coef times half the values' loss.

    The values' loss is the larger of (V - R)² and of the same with V kept within value_clip of what it was in the rollout
    (arXiv:1506.02438's trust region in the form of the PPO reference implementation). Arrays speak of the token at their
    place; `mask` is 1 on the tokens that the policy chose.

    Args:
        correction: weighs the policy's loss of tokens where the sampler's policy was not the old one (sampler_correction).
        entropy: only reported.
        value_mask: where values are learnt, if it is not on `mask`; the batch must then be whole.
    """
    on = mask > 0
    log_ratio = jnp.where(on, logp - old_logp, 0.0)
    ratio = jnp.exp(log_ratio)
    advantages = jnp.where(on, advantages, 0.0)
    policy = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip))
    policy = policy if correction is None else policy * jnp.where(on, correction, 0.0)
    judged = mask if value_mask is None else value_mask
    values, returns, old_values = (jnp.where(judged > 0, x, 0.0) for x in (values, returns, old_values))
    near = jnp.clip(values, old_values - value_clip, old_values + value_clip)
    free, held = jnp.square(values - returns), jnp.square(near - returns)
    of_policy, of_values = weighted(policy, mask), weighted(0.5 * jnp.maximum(free, held), judged)
    share = mask.sum() / jnp.maximum(judged.sum(), 1)  # 1, unless values are learnt elsewhere too
    metrics = {
        "policy_loss": of_policy,
        "value_loss": of_values,
        "clip_frac": weighted((jnp.abs(ratio - 1) > clip).astype(mask.dtype), mask),
        "value_clip_frac": weighted((held > free).astype(mask.dtype), judged),
        "old_kl": weighted(k3(log_ratio), mask),
    }
    if entropy is not None:
        metrics["entropy"] = weighted(entropy, mask)
    return Mean(of_policy.total + value_coef * share * of_values.total, of_policy.weight), metrics
