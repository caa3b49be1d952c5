"""Advantages of sampled completions: from their rewards, how much better than expected each one was."""

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
"""Rewards less what was expected of them, by row of prompts and column of completions; NaN is a missing reward."""


def completion_advantages(
    rewards: Num[Array, "N K"], o: GRPO, kl: Float[Array, " N"] | None = None
) -> tuple[Float[Array, " N"], dict[str, Mean]]:
    """Advantages of N completions by their K rewards, where `group_size` neighbours answer the same prompt.

    The rewards are added with reward_weights, or ("decoupled", GDPO, arXiv:2601.05242) normalised one by
    one first, so that a rare reward is not lost beside a common one. NaN is a missing reward; where all are missing
    the advantage is 0.

    Args:
        kl: of each completion to the reference, in nats (`completion_kl`); kl_coef times it is taken off the reward.
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
    """Advantages of N completions, where `group_size` neighbours answer the same prompt (GRPO, arXiv:2402.03300).

    A reward less its row of BASELINES, over the group's standard deviation (unbiased, plus EPS), over the whole batch's
    ("batch", arXiv:2508.08221), or as it is ("none", Dr. GRPO, arXiv:2503.20783). NaN stands for a missing reward: it
    enters no mean and gets advantage 0. frac_zero_std counts the groups without a preference; their advantages against
    a baseline are exactly 0.
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
    """Weighted sum of K rewards, clipped to `bounds`, if any; a missing reward (NaN) adds nothing, and where all are
    missing the sum is too."""
    rewards = _as_float(rewards)
    total = jnp.nansum(rewards * weights, axis=1)
    clipped = jnp.clip(total, *bounds) if bounds else total
    return jnp.where(jnp.isnan(rewards).all(1), jnp.nan, clipped)


def whiten_advantages(advantages: Float[Array, " N"], present: Bool[Array, " N"]) -> Float[Array, " N"]:
    """Mean 0 and standard deviation 1 over the whole batch (REINFORCE++, arXiv:2501.03262); 0 where not present."""
    mean, std = _moments(jnp.where(present, advantages, jnp.nan))
    return jnp.where(present, (advantages - mean) / (std + EPS), 0.0)


def drop_truncated(mask: Float[Array, "N T"], ended: Bool[Array, " N"]) -> Float[Array, "N T"]:
    """DAPO's overlong filtering (arXiv:2503.14476, section 3.4): completions that did not end by themselves teach nothing."""
    return mask * ended[:, None]


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
