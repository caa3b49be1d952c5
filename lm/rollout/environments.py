"""The rollout of GRPO: groups of completions, compared with each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int, Num, PRNGKeyArray

from lm.experiment import GRPO, Stage
from lm.objectives.advantages import completion_advantages
from lm.rollout.engine import Engine
from lm.rollout.episodes import Tasks, sample_trajectories
from lm.rollout.rewards import timeout_metric
from lm.rollout.trajectory import Rollout, Trajectory, rewards_of, sample_metrics, trajectory_batch
from lm.types import Batch, SharedPrompt, TrainState


def grpo_rollout(
    engine: Engine,
    state: TrainState,
    tasks: Tasks,
    stage: Stage[GRPO],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Rollout:
    """Sample a group of completions for each prompt of the step, reward them and compare them in their group.

    With `rollouts` above 1, further prompts are sampled until there are as many groups with a preference as the step has
    prompts, and groups without one fill what is missing after the last. Metrics are of everything sampled.
    """
    o = stage.objective
    found: list[Trajectory] = []
    timeouts, attempt = 0, 0
    for attempt in range(o.rollouts):
        own_key = jax.random.fold_in(key, attempt) if attempt else key
        sampled = sample_trajectories(
            engine, tasks, step * o.rollouts + attempt, own_key,
            max_new_tokens=o.max_new_tokens, temperature=o.temperature, group_size=o.group_size,
        )  # fmt: skip
        found, timeouts = found + sampled.trajectories, timeouts + sampled.timeouts
        if has_preference(rewards_of(found), o.group_size).sum() >= stage.batch_size:
            break
    rewards = rewards_of(found)
    chosen = fill(rewards, o.group_size, stage.batch_size)
    given, means = completion_advantages(jnp.asarray(rewards)[:, None], o)
    metrics = {name: float(mean.value()) for name, mean in means.items()} | sample_metrics(found)
    metrics |= timeout_metric(timeouts) | ({"rollouts": attempt + 1} if o.rollouts > 1 else {})
    advantages = np.asarray(given)
    batch = trajectory_batch(
        [found[i] for i in chosen], tasks.feed.prompt_len, o.max_new_tokens, tasks.feed.tokenizer.pad_id, advantages[chosen], o.group_size
    )  # fmt: skip
    return Rollout(spread(batch, o.updates_per_rollout), found, advantages, chosen, metrics)


def has_preference(rewards: Num[np.ndarray, " N"], group_size: int) -> Bool[np.ndarray, " P"]:
    """Of each group whether its rewards differ, as float32 numbers; missing ones (NaN) do not count.

    It is so exactly where `group_advantages` has advantages other than 0.
    """
    grouped = np.asarray(rewards, np.float32).reshape(-1, group_size)
    missing = np.isnan(grouped)
    return np.where(missing, np.inf, grouped).min(1) < np.where(missing, -np.inf, grouped).max(1)


def fill(rewards: Float[np.ndarray, " N"], group_size: int, groups: int) -> Int[np.ndarray, " B"]:
    """Rows of so many groups, in order: the first of those with a preference, then the first of the others."""
    chosen = np.argsort(~has_preference(rewards, group_size), kind="stable")[:groups]
    return (np.sort(chosen)[:, None] * group_size + np.arange(group_size)).reshape(-1)


def spread(batch: Batch, updates: int) -> list[Batch]:
    """A batch for each update: the groups are spread over them, so that each update sees every prompt it can."""
    assert batch.shared is not None
    group, rest = divmod(batch.shared.rows, updates)
    batch = dataclasses.replace(batch, shared=None if rest else SharedPrompt(group, batch.shared.tokens))
    return [jax.tree.map(lambda x, i=i: x[i::updates], batch) for i in range(updates)]
