"""PPO on sampled answers: token rewards, advantages and returns of a rollout, and the clipped policy and value losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.experiment import PPO
from lm.objectives.cross_entropy import weighted
from lm.objectives.importance import saturating_ratio
from lm.objectives.kl import KL_ESTIMATORS, k3
from lm.types import Mean

Tokens = Float[Array, "B T"]
Rows = Float[Array, " B"]
Scalar = Float[Array, ""]

EPS = 1e-8  # added to a variance before dividing


# ---- rewards, advantages and returns of a rollout ------------------------------------------------------------------


def with_end(mask: Tokens) -> Tokens:
    """The mask of an answer's tokens, extended by the position after the last one (if the row has it): the final state."""
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
    """Reward of each token: the answer's score at its last token, minus kl_coef times the KL at every token.

    Source: arXiv:1909.08593, eq. 2. Rewards are 0 outside the mask. With a value_mask the score is at its last position.
    """
    kl = KL_ESTIMATORS[kl_estimator](jnp.where(mask > 0, logp - ref_logp, 0.0))
    place, judged = jnp.arange(mask.shape[1]), mask if value_mask is None else value_mask
    last = jnp.max(jnp.where(judged > 0, place, -1), axis=1, keepdims=True)
    return jnp.where(place == last, scores[:, None], 0.0) - kl_coef * kl


def gae(rewards: Tokens, values: Tokens, gamma: float, lam: float) -> Tokens:
    """Generalised advantage estimates Σ (γλ)^k δ with δ = r + γ·V(next) - V (arXiv:1506.02438, eq. 16).

    values[b, t] is the value of the state before token t; both arrays are 0 after the end of a row.
    """
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    delta = rewards + gamma * following - values

    def back(later: Rows, here: Rows) -> tuple[Rows, Rows]:
        found = here + gamma * lam * later
        return found, found

    _, advantages = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
    return advantages.T


def whiten(x: Tokens, mask: Tokens, keep_mean: bool = False) -> Tokens:
    """Whiten x to mean 0 (or keep its mean) and unbiased variance 1 over the mask; 0 outside it."""
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
    """(advantages whitened over the rollout, returns) from token rewards and values.

    Both are 0 outside the mask, or outside the value_mask if there is one.
    """
    if whiten_rewards:
        rewards = whiten(rewards, mask if value_mask is None else value_mask, keep_mean=True)
    advantages = gae(rewards, values, gamma, lam)
    return whiten(advantages, mask), advantages + values


def explained_variance(values: Tokens, returns: Tokens, mask: Tokens) -> Scalar:
    """Explained variance of the critic, 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than the mean."""

    def variance(x: Tokens) -> Scalar:
        mean = (x * mask).sum() / jnp.maximum(mask.sum(), 1)
        return (jnp.square(x - mean) * mask).sum()

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), EPS)


def adaptive_kl_coef(kl_coef: Scalar, kl: Scalar, *, target: float, answers: float, horizon: int) -> Scalar:
    """The KL coefficient after `answers` answers with mean KL `kl`: proportional control (arXiv:1909.08593, section 2.2)."""
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
    """PPO loss, a mean over tokens, and its metrics: clipped policy loss, value loss and entropy bonus.

    The policy loss is the clipped surrogate (arXiv:1707.06347, eq. 7). The value loss, weighted by value_coef, is half the
    larger of (V - R)² and the same with V clipped to its value at the rollout ± value_clip (as in the PPO reference
    implementation). The entropy bonus is entropy_coef times the mean entropy (arXiv:1707.06347, eq. 9).

    Args:
        mask: 1 on the tokens that the policy sampled; values elsewhere are ignored.
        returns: targets of the values.
        old_logp: log-probabilities at the time of the rollout.
        old_values: values at the time of the rollout.
        correction: importance weight of each token for the mismatch of sampler and old policy (`sampler_correction`).
        entropy: entropy of the policy at each token, in nats.
        value_mask: positions whose values are trained, if different from `mask` (`with_end`).
        share: `mask_share` of the whole batch, if these rows are a microbatch.
    """
    on = mask > 0
    log_ratio = jnp.where(on, logp - old_logp, 0.0)
    advantages = jnp.where(on, advantages, 0.0)
    ratio = saturating_ratio(log_ratio, advantages >= 0)
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
    """Ratio of policy tokens to value positions: the factor that turns the summed value loss into a mean over positions."""
    return mask.sum() / jnp.maximum(value_mask.sum(), 1)
