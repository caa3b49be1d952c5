"""The GRPO family: groups of sampled completions, rewarded and compared within their group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from lm.algorithms.algorithm import Algorithm, reference_of, sample_once
from lm.experiment import GRPO, Stage
from lm.model.heads import Scorer
from lm.model.transformer import Transformer
from lm.objectives.advantages import completion_advantages, drop_truncated
from lm.objectives.cross_entropy import weighted
from lm.objectives.grpo import entropy_scale, grpo
from lm.objectives.importance import sampler_correction
from lm.objectives.kl import completion_kl, k3
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import fetch, to_devices
from lm.rollout.engine import Engine
from lm.rollout.episodes import Sampled, Tasks
from lm.rollout.rewards import timeout_metric
from lm.rollout.scores import check_finite, score_rows
from lm.rollout.trajectory import Rollout, Trajectory, reward_metrics, rewards_of, sample_metrics, trajectory_batch
from lm.train_step import Models, Step, TrainState, make_step
from lm.types import NOTHING_SHARED, Mean, RolloutBatch, SharedPrompt


def reads_reference(o: GRPO) -> bool:
    """Whether the reference is needed: for a KL penalty in the loss or in the rewards."""
    return o.kl_coef > 0


def extra_forward_passes(o: GRPO) -> int:
    """Forward passes of the reference in a step: 1 with a KL penalty in the loss, else 0."""
    return int(o.kl_coef > 0 and o.kl_in == "loss")


def grpo_step(stage: Stage[GRPO], optimizer: optax.GradientTransformation) -> Step:
    """Training step of the GRPO family on sampled completions with their advantages."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: RolloutBatch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch, o.temperature, want_entropy=True)
        ref_logp = None
        if o.kl_coef and o.kl_in == "loss":
            ref_logp = jax.lax.stop_gradient(token_logprobs(reference_of(models, frozen), batch, o.temperature).logp)
        correction, gap = None, {}
        if o.corrects_sampler:
            gap = {"sampler_kl": weighted(k3(batch.old_logp - batch.sampler_logp), batch.weights)}
            if o.tis_clip:
                correction = sampler_correction(batch.old_logp, batch.sampler_logp, batch.weights, o)
        mean, metrics = grpo(
            stats.logp, batch.weights, batch.advantages, o, old_logp=batch.old_logp, ref_logp=ref_logp,
            sampler_logp=batch.sampler_logp if o.corrects_sampler else None, correction=correction, entropy=stats.entropy,
            entropy_scale=frozen.get("entropy_scale"),
        )  # fmt: skip
        return mean, metrics | gap | stats.aux

    def batch_stats(models: Models, frozen: Any, batch: RolloutBatch) -> dict[str, Array]:
        return {"entropy_scale": entropy_scale(batch.weights, o)}

    return make_step(loss, stage, optimizer, batch_stats if o.entropy_coef and o.top_entropy == 1 else None)


def grpo_sample(
    engine: Engine,
    frozen: Mapping[str, Any],
    tasks: Tasks,
    stage: Stage[GRPO],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Sampled:
    """Sample a group of completions for each prompt of the step, with their rewards by name.

    With `rollouts` above 1, further prompts are sampled until there are as many groups with a preference as the step has prompts.
    """
    o = stage.objective
    found: list[Trajectory] = []
    timeouts = 0
    for attempt in range(o.rollouts):
        own_key = jax.random.fold_in(key, attempt) if attempt else key
        sampled = sample_once(engine, frozen, tasks, stage, step * o.rollouts + attempt, own_key, place)
        new = sampled.trajectories
        if o.reward_models:
            batch = trajectory_batch(new, tasks.feed.prompt_len, o.max_new_tokens, tasks.feed.tokenizer.pad_id)
            new = with_scores(new, frozen["scorers"], to_devices(batch, place, None, len(new)), stage, step)
        found, timeouts = found + new, timeouts + sampled.timeouts
        if has_preference(reward_columns(found, o.combined_rewards), o.group_size).sum() >= stage.batch_size:
            break
    return Sampled(found, timeouts)


def grpo_rollout(
    sampled: Sampled,
    state: TrainState,
    tasks: Tasks,
    stage: Stage[GRPO],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Rollout:
    """Advantages of a step's completions, and the batches of its updates.

    Groups with a preference come first; groups without one fill what is missing. Metrics are of everything sampled.
    """
    o, (found, timeouts) = stage.objective, sampled
    batched = functools.partial(
        trajectory_batch, prompt_width=tasks.feed.prompt_len, width=o.max_new_tokens, pad_id=tasks.feed.tokenizer.pad_id
    )
    rewards, kl = reward_columns(found, o.combined_rewards), None
    if o.kl_coef and o.kl_in == "reward":
        kl = fetch(
            kl_to_reference(
                reference_of(state.models, state.frozen), to_devices(batched(found), place, None, len(found)), o
            )
        )
    given, means = completion_advantages(jnp.asarray(rewards), o, kl)
    if o.combined_rewards:
        totals = (rewards * (o.reward_weights or 1.0)).sum(1).tolist()
        found = [dataclasses.replace(one, reward=total) for one, total in zip(found, totals, strict=True)]
    advantages, chosen = np.asarray(given), fill(rewards, o.group_size, stage.batch_size)
    metrics = {name: float(mean.value()) for name, mean in means.items()} | sample_metrics(found)
    metrics |= {f"reward_{name}": float(rewards[:, place].mean()) for place, name in enumerate(o.combined_rewards)}
    metrics |= reward_metrics(found) if o.environment else {}
    metrics |= timeout_metric(timeouts)
    metrics |= {"rollouts": len(found) / (stage.batch_size * o.group_size)} if o.rollouts > 1 else {}
    metrics |= {} if kl is None else {"kl": float(np.mean(kl))}
    batch = batched([found[i] for i in chosen], advantages=advantages[chosen], group_size=o.group_size)
    if o.drop_truncated:
        ended = jnp.asarray([found[i].ended for i in chosen])
        batch = dataclasses.replace(batch, weights=np.asarray(drop_truncated(batch.weights, ended)))
    rows = np.concatenate([chosen[i :: o.updates_per_rollout] for i in range(o.updates_per_rollout)])
    return Rollout(spread(batch, o.updates_per_rollout), found, advantages, chosen, metrics, rows=rows)


def with_scores(
    trajectories: Sequence[Trajectory],
    scorers: tuple[Scorer, ...],
    batch: RolloutBatch,
    stage: Stage[GRPO],
    step: int,
) -> list[Trajectory]:
    """The trajectories of a batch with the score of each reward model of the stage among their rewards, by its name.

    Raises:
        UserError: a score is not finite; names the prompt.
    """
    columns = {}
    for name, scorer in zip(stage.objective.reward_models, scorers, strict=True):
        scores = np.asarray(fetch(score_rows((scorer,), batch)))
        check_finite(scores, [one.prompt for one in trajectories], f"{stage.name}, step {step + 1}, {name}")
        columns[name] = scores.tolist()
    return [
        dataclasses.replace(one, rewards={**one.rewards, **{name: scores[i] for name, scores in columns.items()}})
        for i, one in enumerate(trajectories)
    ]


def reward_columns(trajectories: Sequence[Trajectory], names: Sequence[str]) -> Float[np.ndarray, "N K"]:
    """Rewards [N, K] of the trajectories by name (0 after a timeout); without names, their single reward."""
    if not names:
        return rewards_of(trajectories)[:, None]
    return np.array([[one.rewards.get(name, 0.0) for name in names] for one in trajectories], np.float32)


@functools.partial(jax.jit, static_argnames="o")
def kl_to_reference(reference: Transformer, batch: RolloutBatch, o: GRPO) -> Float[Array, " B"]:
    """KL of each completion to the reference in nats, estimated from the log-probabilities at sampling."""
    ref_logp = token_logprobs(reference, batch, o.temperature).logp
    return completion_kl(batch.old_logp, ref_logp, batch.weights, o.kl_estimator)


def has_preference(rewards: Num[np.ndarray, "N ..."], group_size: int) -> Bool[np.ndarray, " P"]:
    """Whether the rewards of each group differ (in any of K rewards, compared as float32; NaN is ignored).

    For one reward it is so exactly where `group_advantages` has advantages other than 0.
    """
    grouped = np.asarray(rewards, np.float32).reshape(len(rewards) // group_size, group_size, -1)
    missing = np.isnan(grouped)
    return (np.where(missing, np.inf, grouped).min(1) < np.where(missing, -np.inf, grouped).max(1)).any(1)


def fill(rewards: Float[np.ndarray, "N ..."], group_size: int, groups: int) -> Int[np.ndarray, " B"]:
    """Row indices of the first `groups` groups with unequal rewards, filled up with other groups if there are too few."""
    chosen = np.argsort(~has_preference(rewards, group_size), kind="stable")[:groups]
    return (np.sort(chosen)[:, None] * group_size + np.arange(group_size)).reshape(-1)


def spread(batch: RolloutBatch, updates: int) -> list[RolloutBatch]:
    """Split a rollout into one batch per update, with every group spread over the batches."""
    group, rest = divmod(batch.shared.rows, updates)
    batch = dataclasses.replace(batch, shared=NOTHING_SHARED if rest else SharedPrompt(group, batch.shared.tokens))
    return [jax.tree.map(lambda x, i=i: x[i::updates], batch) for i in range(updates)]


ALGORITHM = Algorithm(
    grpo_step,
    sample=grpo_sample,
    rollout=grpo_rollout,
    reads_reference=reads_reference,
    batch=lambda o: RolloutBatch,
    extra_forward_passes=extra_forward_passes,
    keeps_scorers=True,
)
