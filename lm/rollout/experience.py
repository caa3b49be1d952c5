"""A rollout for PPO: completions sampled by the policy, their scores, and the advantage and return of each token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from lm.experiment import PPO, Stage, UserError, corrects_sampler
from lm.model.scorer import Scorer
from lm.objectives.logprobs import last_scores, token_logprobs
from lm.objectives.ppo import experience, explained_variance, token_rewards, with_end
from lm.parallel.distributed import fetch, to_devices
from lm.rollout.engine import Engine
from lm.rollout.episodes import Tasks, sample_trajectories
from lm.rollout.rewards import timeout_metric
from lm.rollout.sampler_gap import trainer_view
from lm.rollout.trajectory import Rollout, rescored, rewards_of, sample_metrics, trajectory_batch
from lm.steps import critic_values
from lm.train_step import TrainState
from lm.types import Batch

ENSEMBLES: dict[str, Callable[..., Array]] = {"mean": jnp.mean, "min": jnp.min}


def ppo_rollout(
    engine: Engine,
    state: TrainState,
    tasks: Tasks,
    stage: Stage[PPO],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Rollout:
    """Sample an answer to each prompt of the step, score it, and prepare the batches of every update.

    Raises:
        UserError: a score is not finite; names the prompt.
    """
    o = stage.objective
    found, timeouts = sample_trajectories(
        engine, tasks, step, key, max_new_tokens=o.max_new_tokens, temperature=o.temperature
    )
    host, count = (
        trajectory_batch(found, tasks.feed.prompt_len, o.max_new_tokens, tasks.feed.tokenizer.pad_id),
        len(found),
    )
    batch = to_devices(host, place, None, count)
    if corrects_sampler(o):  # advantages, and where ratios begin, is then the trainer's
        view = trainer_view(state.models["policy"], batch, o.temperature, stage.microbatches)
        host = replace(host, sampler_logp=host.old_logp, old_logp=np.asarray(fetch(view.logp)))
        batch = to_devices(host, place, None, count)
    scores = judged = rewards_of(found)
    if o.reward_models:
        scores = np.asarray(fetch(score_rows(state.frozen["scorers"], batch, o.ensemble)))
    check_finite(scores, [one.prompt for one in found], f"{stage.name}, step {step + 1}")
    ended = np.array([one.ended for one in found])
    counted = (scores - o.missing_eos_penalty * ~ended).astype(np.float32)
    per_token, stats = fetch(advantages_and_returns(state, batch, to_devices(counted, place, None, count), o))
    metrics = (
        {name: float(value) for name, value in stats.items()} | sample_metrics(found) | {"score": float(scores.mean())}
    )
    if count > 1:
        metrics["score_range"] = float(scores.max() - scores.min())
    if o.verifier:
        metrics |= {"judge": float(judged.mean())} | timeout_metric(timeouts)
    advantages = per_token["advantages"].sum(1) / np.maximum(host.weights.sum(1), 1)
    batches = make_minibatches(replace(host, **per_token), o, key)
    found = [rescored(one, score) for one, score in zip(found, scores.tolist(), strict=True)]
    return Rollout(batches, found, advantages, np.arange(count), metrics)


def make_minibatches(batch: Batch, o: PPO, key: PRNGKeyArray) -> list[Batch]:
    """The minibatches of a rollout: every row once an epoch, in an order of its own."""
    batches = []
    for epoch in range(o.epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), len(batch.tokens)))
        batches += [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in np.split(order, o.minibatches)]
    return batches


@functools.partial(jax.jit, static_argnames="ensemble")
def score_rows(scorers: tuple[Scorer, ...], batch: Batch, ensemble: str = "mean") -> Float[Array, " B"]:
    """The score of each row's answer, one of all reward models'."""
    return ENSEMBLES[ensemble](jnp.stack([last_scores(scorer, batch) for scorer in scorers]), axis=0)


@functools.partial(jax.jit, static_argnames="o")
def advantages_and_returns(
    state: TrainState, batch: Batch, scores: Float[Array, " B"], o: PPO
) -> tuple[dict[str, Float[Array, "B T"]], dict[str, Array]]:
    """Advantages, returns and what else an update reads of a rollout, by field of the batch, with the metrics of both."""
    policy, mask = state.models["policy"], batch.weights
    assert batch.old_logp is not None
    ref_logp = token_logprobs(state.frozen["reference"], batch, o.temperature).logp * mask
    hidden = policy.hidden(batch.tokens, batch.positions, batch.segments)[0] if o.critic == "head" else None
    judged = with_end(mask) if o.value_after_end else mask
    values = critic_values(state.models["critic"], batch, hidden) * judged
    kl_coef = state.carry["kl_coef"]
    rewards = token_rewards(scores, batch.old_logp, ref_logp, mask, kl_coef, o.kl_estimator, judged)
    advantages, returns = experience(
        rewards, values, mask, gamma=o.gamma, lam=o.lam, whiten_rewards=o.whiten_rewards, value_mask=judged
    )
    per_token = {"advantages": advantages, "returns": returns * judged, "values": values, "ref_logp": ref_logp}
    stats = {
        "kl": ((batch.old_logp - ref_logp) * mask).sum(1).mean(),
        "reward": rewards.sum(1).mean(),
        "explained_variance": explained_variance(values, returns, judged),
        "kl_coef": kl_coef,
    }
    return per_token, stats


def check_finite(scores: Float[np.ndarray, " B"], asked: list[str], where: str) -> None:
    """Raises UserError where a score is not finite; names the prompt."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"{where}: the reward of {len(bad)} of {len(scores)} answers is {scores[bad[0]]}, the first to "
            f"{asked[bad[0]]!r:.60}; what was saved is kept. A reward has to be finite: look at the reward model, or the verifier"
        )
