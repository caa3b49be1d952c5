"""Advantages of sampled completions: reward minus baseline, scaled and optionally whitened."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from lm.experiment import GRPO
from lm.types import Mean

Groups = Float[Array, "P G"]

EPS = 1e-4  # added to a standard deviation before dividing


def group_mean(rewards: Groups) -> Groups:
    """r - mean of the group (GRPO, arXiv:2402.03300, section 4.1.2)."""
    return rewards - _moments(rewards, axis=1)[0]


def leave_one_out(rewards: Groups) -> Groups:
    """r - mean of the group's other completions (RLOO, arXiv:2402.14740), which is n / (n - 1) times r - mean of all n."""
    count = (~jnp.isnan(rewards)).sum(1, keepdims=True)
    return group_mean(rewards) * (count / jnp.maximum(count - 1, 1))


BASELINES: dict[str, Callable[[Groups], Groups]] = {
    "group": group_mean,
    "leave_one_out": leave_one_out,
    "none": lambda rewards: rewards,
}
"""GRPO.baseline -> function of rewards [prompts, completions] that subtracts the baseline; NaN is a missing reward."""


def completion_advantages(
    rewards: Num[Array, "N K"], o: GRPO, kl: Float[Array, " N"] | None = None
) -> tuple[Float[Array, " N"], dict[str, Mean]]:
    """Advantages of N completions from their K rewards; every `group_size` neighbouring rows answer the same prompt.

    The rewards are summed with reward_weights, or ("decoupled", GDPO, arXiv:2601.05242) normalised one by one before they are
    summed, so that a rare reward keeps its influence beside a frequent one. NaN is a missing reward; a completion without any
    reward has advantage 0.

    Args:
        kl: KL of each completion to the reference, in nats (`completion_kl`); kl_coef times it is subtracted from the reward.

    Returns:
        The advantages, and metrics of the rewards (see `group_advantages`).
    """
    weights = jnp.asarray(o.reward_weights or (1.0,) * rewards.shape[1])
    combined = combine_rewards(rewards, weights, o.reward_clip)
    combined = combined if kl is None else combined - o.kl_coef * kl
    advantages, metrics = group_advantages(combined, o.group_size, baseline=o.baseline, scale=o.advantage_scale)
    if o.reward_combination == "decoupled":
        each = [
            group_advantages(column, o.group_size, baseline=o.baseline, scale=o.advantage_scale)[0]
            for column in rewards.T
        ]
        advantages = jnp.stack(each, axis=1) @ weights
    if o.whiten_advantages:
        advantages = whiten_advantages(advantages, ~jnp.isnan(combined))
    return advantages, metrics


def group_advantages(
    rewards: Num[Array, " N"], group_size: int, *, baseline: str = "group", scale: str = "group"
) -> tuple[Float[Array, " N"], dict[str, Mean]]:
    """Advantages of N completions from one reward each; `group_size` neighbouring rows answer the same prompt.

    The reward minus its baseline is divided by the group's standard deviation (unbiased, plus EPS; GRPO, arXiv:2402.03300),
    by that of the whole batch ("batch", arXiv:2508.08221), or not divided ("none", Dr. GRPO, arXiv:2503.20783). NaN is a
    missing reward: it enters no mean and has advantage 0. Metric frac_zero_std is the fraction of groups whose rewards are all
    equal; with a baseline their advantages are exactly 0.
    """
    rewards = _as_float(rewards)
    grouped = rewards.reshape(-1, group_size)
    present = ~jnp.isnan(grouped)
    _, std = _moments(grouped, axis=1)
    most, least = jnp.where(present, grouped, -jnp.inf).max(1), jnp.where(present, grouped, jnp.inf).min(1)
    flat = most <= least  # exact, where the float32 standard deviation of equal rewards need not be 0
    scales = {"group": std + EPS, "batch": _moments(rewards)[1] + EPS, "none": jnp.ones_like(std)}
    counted = present if baseline == "none" else present & ~flat[:, None]
    advantages = jnp.where(counted, BASELINES[baseline](grouped) / scales[scale], 0.0)
    number = jnp.asarray(len(flat), rewards.dtype)
    metrics = {
        "reward": Mean(jnp.where(present, grouped, 0.0).sum(), present.sum().astype(rewards.dtype)),
        "reward_std": Mean(std.sum(), number),
        "frac_zero_std": Mean(flat.sum().astype(rewards.dtype), number),
    }
    return advantages.reshape(-1), metrics


def combine_rewards(
    rewards: Num[Array, "N K"], weights: Float[Array, " K"], bounds: Sequence[float] = ()
) -> Float[Array, " N"]:
    """Weighted sum of K rewards, clipped to `bounds` if given; NaN is a missing reward, and the sum of none is NaN."""
    rewards = _as_float(rewards)
    total = jnp.nansum(rewards * weights, axis=1)
    clipped = jnp.clip(total, *bounds) if bounds else total
    return jnp.where(jnp.isnan(rewards).all(1), jnp.nan, clipped)


def whiten_advantages(advantages: Float[Array, " N"], present: Bool[Array, " N"]) -> Float[Array, " N"]:
    """Advantages with mean 0 and standard deviation 1 over the batch (REINFORCE++, arXiv:2501.03262); 0 where not present."""
    mean, std = _moments(jnp.where(present, advantages, jnp.nan))
    return jnp.where(present, (advantages - mean) / (std + EPS), 0.0)


def drop_truncated(mask: Float[Array, "N T"], ended: Bool[Array, " N"]) -> Float[Array, "N T"]:
    """Loss mask without truncated completions: DAPO's overlong filtering (arXiv:2503.14476, section 3.4)."""
    return mask * ended[:, None]


def _as_float(x: Array) -> Array:
    """The array in float32 or wider, since integer rewards would give integer advantages."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _moments(x: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Mean and unbiased standard deviation of the values that are not NaN (0 without any); keeps the dimensions."""
    present = ~jnp.isnan(x)
    count = present.sum(axis, keepdims=True)
    mean = jnp.where(present, x, 0.0).sum(axis, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(present, jnp.square(x - mean), 0.0).sum(axis, keepdims=True)
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))
