"""PPO on whole answers: rewards of tokens, advantages and returns of a rollout, and the clipped loss of policy and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.experiment import PPO
from lm.objectives.cross_entropy import weighted
from lm.objectives.kl import KL_ESTIMATORS, k3
from lm.types import Mean

Tokens = Float[Array, "B T"]
Rows = Float[Array, " B"]
Scalar = Float[Array, ""]

EPS = 1e-8  # added to a variance before dividing


# ---- what a rollout is worth ---------------------------------------------------------------------------------------


def with_end(mask: Tokens) -> Tokens:
    """The mask of an answer's tokens, and the place behind its last one, where the row has one: the state after the answer."""
    return jnp.maximum(mask, jnp.pad(mask[:, :-1], ((0, 0), (1, 0))))


def token_rewards(
    scores: Rows,
    logp: Tokens,
    ref_logp: Tokens,
    mask: Tokens,
    kl_coef: Scalar | float,
    kl_estimator: str = "k1",
    value_mask: Tokens | None = None,
) -> Tokens:
    """An answer's score at its last token, less kl_coef times the KL at each (arXiv:1909.08593, eq. 2).

    0 off the mask. With a value_mask the score stands at the last place of that.
    """
    kl = KL_ESTIMATORS[kl_estimator](jnp.where(mask > 0, logp - ref_logp, 0.0))
    place, judged = jnp.arange(mask.shape[1]), mask if value_mask is None else value_mask
    last = jnp.max(jnp.where(judged > 0, place, -1), axis=1, keepdims=True)
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
    value_mask: Tokens | None = None,
) -> tuple[Tokens, Tokens]:
    """(advantages, whitened over the rollout; returns, which are not) of token rewards and of values.

    Both are 0 off the mask, or off the value_mask where there is one.
    """
    if whiten_rewards:
        rewards = whiten(rewards, mask if value_mask is None else value_mask, keep_mean=True)
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
    o: PPO,
    *,
    correction: Tokens | None = None,
    entropy: Tokens | None = None,
    value_mask: Tokens | None = None,
    share: Scalar | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Mean over tokens of the clipped surrogate (arXiv:1707.06347, eq. 7) and of value_coef times half the values' loss.

    The values' loss is the larger of (V - R)² and of the same with V kept within value_clip of what it was in the rollout
    (arXiv:1506.02438's trust region in the form of the PPO reference implementation). entropy_coef times the mean entropy is
    taken off (arXiv:1707.06347, eq. 9). Arrays speak of the token at their
    place; `mask` is 1 on the tokens that the policy chose.

    Args:
        correction: weighs the policy's loss of tokens where the sampler's policy was not the old one (sampler_correction).
        entropy: of the policy at each token, in nats.
        value_mask: where values are learnt, if it is not on `mask` (`with_end`).
        share: `mask_share` of the whole batch where these rows are a piece of it.
    """
    on = mask > 0
    log_ratio = jnp.where(on, logp - old_logp, 0.0)
    ratio = jnp.exp(log_ratio)
    advantages = jnp.where(on, advantages, 0.0)
    policy = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - o.clip, 1 + o.clip))
    policy = policy if correction is None else policy * jnp.where(on, correction, 0.0)
    judged = mask if value_mask is None else value_mask
    values, returns, old_values = (jnp.where(judged > 0, x, 0.0) for x in (values, returns, old_values))
    near = jnp.clip(values, old_values - o.value_clip, old_values + o.value_clip)
    free, held = jnp.square(values - returns), jnp.square(near - returns)
    of_policy, of_values = weighted(policy, mask), weighted(0.5 * jnp.maximum(free, held), judged)
    share = mask_share(mask, judged) if share is None else share
    metrics = {
        "policy_loss": of_policy,
        "value_loss": of_values,
        "clip_frac": weighted((jnp.abs(ratio - 1) > o.clip).astype(mask.dtype), mask),
        "value_clip_frac": weighted((held > free).astype(mask.dtype), judged),
        "old_kl": weighted(k3(log_ratio), mask),
    }
    total = of_policy.total + o.value_coef * share * of_values.total
    if entropy is not None:
        metrics["entropy"] = weighted(entropy, mask)
        total = total - o.entropy_coef * metrics["entropy"].total if o.entropy_coef else total
    return Mean(total, of_policy.weight), metrics


def mask_share(mask: Tokens, value_mask: Tokens) -> Scalar:
    """Tokens for each place where values are learnt: times this, their sum becomes, divided as the loss is, a mean over these."""
    return mask.sum() / jnp.maximum(value_mask.sum(), 1)
