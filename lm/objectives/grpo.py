"""The GRPO family: advantages × ratio level × surrogate × aggregation, each a choice of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from lm.objectives.cross_entropy import weighted
from lm.types import Mean

Tokens = Float[Array, "B T"]

EPS = 1e-4  # added to a standard deviation before dividing


# Advantages: rewards of grouped completions -> how much better than expected each one was.


def group_advantages(
    rewards: Num[Array, " N"],
    group_size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
) -> tuple[Float[Array, " N"], dict[str, Mean]]:
    """Advantages of N completions, where `group_size` neighbours answer the same prompt (GRPO, arXiv:2402.03300).

    A reward less the mean of its group, over the group's standard deviation (unbiased, plus EPS), over the whole
    batch's ("batch", arXiv:2508.08221), or as it is ("none", Dr. GRPO, arXiv:2503.20783). NaN stands for a missing
    reward: it enters no mean and gets advantage 0. frac_zero_std counts the groups without a preference, whose
    advantages are exactly 0.
    """
    rewards = _as_float(rewards)
    grouped = rewards.reshape(-1, group_size)
    present = ~jnp.isnan(grouped)
    mean, std = _moments(grouped, axis=1)
    most, least = jnp.where(present, grouped, -jnp.inf).max(1), jnp.where(present, grouped, jnp.inf).min(1)
    flat = most <= least  # exact, where the float32 standard deviation of equal rewards need not be 0
    scales = {"group": std + EPS, "batch": _moments(rewards)[1] + EPS, "none": jnp.ones_like(std)}
    advantages = jnp.where(present & ~flat[:, None], (grouped - mean) / scales[scale], 0.0)
    number = jnp.asarray(len(flat), rewards.dtype)
    metrics = {
        "reward": Mean(jnp.where(present, grouped, 0.0).sum(), present.sum().astype(rewards.dtype)),
        "reward_std": Mean(std.sum(), number),
        "frac_zero_std": Mean(flat.sum().astype(rewards.dtype), number),
    }
    return advantages.reshape(-1), metrics


def combine_rewards(rewards: Num[Array, "N K"], weights: Float[Array, " K"]) -> Float[Array, " N"]:
    """Weighted sum of K rewards; a missing one (NaN) adds nothing, and where all are missing the sum is too."""
    rewards = _as_float(rewards)
    return jnp.where(jnp.isnan(rewards).all(1), jnp.nan, jnp.nansum(rewards * weights, axis=1))


def decoupled_advantages(
    rewards: Num[Array, "N K"], weights: Float[Array, " K"], group_size: int
) -> Float[Array, " N"]:
    """GDPO (arXiv:2601.05242): each reward is normalised in its group, then the weighted sum over the batch."""
    columns = [group_advantages(column, group_size)[0] for column in rewards.T]
    total = jnp.stack(columns, axis=1) @ weights
    mean, std = _moments(total)
    return (total - mean) / (std + EPS)


def drop_truncated(mask: Float[Array, "N T"], tokens: Int[Array, "N T"], eos_id: int) -> Float[Array, "N T"]:
    """DAPO's overlong filtering (arXiv:2503.14476, section 3.4): completions without their end teach nothing."""
    ended: Bool[Array, "N 1"] = ((tokens == eos_id) & (mask > 0)).any(1, keepdims=True)
    return mask * ended


# Ratio levels: (log π - log π_old, 0 off the mask; mask) -> log of the importance ratio.


def token_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """Each token has its own (GRPO, arXiv:2402.03300)."""
    return log_ratio


def sequence_ratio(log_ratio: Tokens, mask: Tokens) -> Tokens:
    """All tokens have the geometric mean over their sequence (GSPO, arXiv:2507.18071)."""
    lengths = jnp.maximum(mask.sum(1, keepdims=True), 1)
    return jnp.broadcast_to((log_ratio * mask).sum(1, keepdims=True) / lengths, log_ratio.shape)


RATIO_LEVELS: dict[str, Callable[[Tokens, Tokens], Tokens]] = {"token": token_ratio, "sequence": sequence_ratio}


# Surrogates: what is maximised at each token, and the lower and upper bound of the ratio.


def clipped(
    ratio: Tokens, logp: Tokens, advantages: Tokens, clip_low: float, clip_high: float, delta: float | None
) -> tuple[Tokens, float, float]:
    """PPO's pessimistic clip (arXiv:1707.06347, eq. 7) with two bounds (DAPO, arXiv:2503.14476, section 3.1).

    delta, if given, also bounds the ratio where the advantage is negative (INTELLECT-2, arXiv:2505.07291).
    """
    low, high = 1 - clip_low, 1 + clip_high
    unclipped = ratio if delta is None else jnp.minimum(ratio, delta)
    return jnp.minimum(unclipped * advantages, jnp.clip(ratio, low, high) * advantages), low, high


def cispo(
    ratio: Tokens, logp: Tokens, advantages: Tokens, clip_low: float, clip_high: float, delta: float | None
) -> tuple[Tokens, float, float]:
    """CISPO (arXiv:2506.13585): a capped ratio, held fixed, weighs log π. clip_high is the cap itself."""
    return jax.lax.stop_gradient(jnp.minimum(ratio, clip_high)) * advantages * logp, 0.0, clip_high


SURROGATES: dict[str, Callable[..., tuple[Tokens, float, float]]] = {"clipped": clipped, "cispo": cispo}


# Aggregations: (losses of tokens, mask, longest completion) -> mean. Weights add up over microbatches.


def token_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Every token of the whole batch counts the same (DAPO, arXiv:2503.14476, section 3.3)."""
    return Mean((per_token * mask).sum(), mask.sum())


def sequence_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Every completion counts the same, its tokens share (GRPO, arXiv:2402.03300, eq. 3)."""
    per_row = (per_token * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
    return Mean(per_row.sum(), jnp.asarray(len(mask), per_row.dtype))


def constant_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Sums over completions, divided by a constant length (Dr. GRPO, arXiv:2503.20783)."""
    return Mean((per_token * mask).sum(), jnp.asarray(len(mask) * max_len, per_token.dtype))


AGGREGATIONS: dict[str, Callable[[Tokens, Tokens, int], Mean]] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "constant": constant_mean,
}


def grpo(
    logp: Tokens,
    mask: Tokens,
    advantages: Tokens,
    *,
    max_len: int,
    old_logp: Tokens | None = None,
    ref_logp: Tokens | None = None,
    correction: Tokens | None = None,
    entropy: Tokens | None = None,
    ratio_level: str = "token",
    surrogate: str = "clipped",
    aggregation: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    kl_coef: float = 0.0,
) -> tuple[Mean, dict[str, Mean]]:
    """Policy-gradient loss of sampled completions, a mean as AGGREGATIONS say; arrays speak of the token at their place.

    `mask` is 1 on the tokens that the policy chose; what stands elsewhere does not matter. Without `old_logp` the
    batch is on-policy: the ratio is 1 and has a gradient. `correction` weighs tokens where the sampler's policy was
    not the old one (see sampler_correction). `ref_logp` adds kl_coef times the k3 estimate of KL(π ‖ reference) after
    every mask and clip. `max_len`, in tokens, matters to aggregation "constant" only. `entropy` is only reported.
    """
    on = mask > 0
    old_logp = jax.lax.stop_gradient(logp) if old_logp is None else old_logp
    log_ratio = jnp.where(on, logp - old_logp, 0.0)
    ratio = jnp.exp(RATIO_LEVELS[ratio_level](log_ratio, mask))
    logp, advantages = jnp.where(on, logp, 0.0), jnp.where(on, advantages, 0.0)
    gain, low, high = SURROGATES[surrogate](ratio, logp, advantages, clip_low, clip_high, delta)
    per_token = -gain if correction is None else -gain * jnp.where(on, correction, 0.0)
    metrics = {
        "clip_low_frac": _fraction((ratio < low) & (advantages < 0), mask),
        "clip_high_frac": _fraction((ratio > high) & (advantages > 0), mask),
        "old_kl": weighted(k3(log_ratio), mask),
    }
    if ref_logp is not None:
        kl = k3(jnp.where(on, ref_logp - logp, 0.0))
        per_token = per_token + kl_coef * kl
        metrics["kl"] = weighted(kl, mask)
    if entropy is not None:
        metrics["entropy"] = weighted(entropy, mask)
    return AGGREGATIONS[aggregation](per_token, mask, max_len), metrics


def k3(log_ratio: Tokens) -> Tokens:
    """Estimate of KL(p ‖ q) from samples of p, given log q - log p: unbiased, never negative (Schulman 2020)."""
    return jnp.expm1(log_ratio) - log_ratio


def sampler_correction(
    old_logp: Tokens,
    sampler_logp: Tokens,
    mask: Tokens,
    *,
    level: str = "token",
    low: float = 0.0,
    high: float = 2.0,
    mode: str = "truncate",
) -> Tokens:
    """Importance ratio of the trainer's old policy to the sampler that drew the tokens, kept within bounds.

    At level "sequence" all tokens of a row have the product of its ratios. "truncate" caps the ratio at `high` (TIS,
    Yao et al. 2025, fengyao.notion.site/off-policy-rl); "mask" drops what is not within [low, high].
    """
    log_ratio = jnp.where(mask > 0, old_logp - sampler_logp, 0.0)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(1, keepdims=True), log_ratio.shape)
    ratio = jnp.exp(log_ratio)
    if mode == "truncate":
        return jnp.minimum(ratio, high)
    return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _fraction(which: Bool[Array, "B T"], mask: Tokens) -> Mean:
    return weighted(which.astype(mask.dtype), mask)


def _as_float(x: Array) -> Array:
    """At least float32: integer rewards would make integer advantages."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _moments(x: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Mean and unbiased standard deviation of what is not NaN, 0 where there is nothing; axes are kept."""
    present = ~jnp.isnan(x)
    count = present.sum(axis, keepdims=True)
    mean = jnp.where(present, x, 0.0).sum(axis, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(present, jnp.square(x - mean), 0.0).sum(axis, keepdims=True)
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))
