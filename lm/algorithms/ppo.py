"""PPO: sampled answers with one score each; policy and critic are trained together."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lm.algorithms.algorithm import Algorithm, reference_of
from lm.experiment import PPO, Stage
from lm.model.heads import ScoreHead, Scorer
from lm.model.transformer import Transformer
from lm.objectives.importance import sampler_correction
from lm.objectives.logprobs import token_logprobs, token_values
from lm.objectives.ppo import adaptive_kl_coef, experience, explained_variance, mask_share, ppo, token_rewards, with_end
from lm.parallel.distributed import fetch, to_devices
from lm.rollout.episodes import Sampled, Tasks
from lm.rollout.rewards import timeout_metric
from lm.rollout.sampler_gap import trainer_view
from lm.rollout.scores import check_finite, score_rows
from lm.rollout.trajectory import Rollout, rescored, rewards_of, sample_metrics, trajectory_batch
from lm.train_step import Metrics, Models, Step, TrainState, make_step
from lm.types import Aux, CriticBatch, Mean, RolloutBatch, TokenBatch


def models(o: PPO, model: Transformer, scorers: tuple[Scorer, ...], key: PRNGKeyArray | None) -> Models:
    """Policy and critic; the critic is a copy of the first reward model (or policy), or a value head that starts at 0."""
    if o.critic == "head":
        return {"policy": model, "critic": ScoreHead(model.config, None)}
    return {"policy": model, "critic": scorers[0] if scorers else Scorer(model, None)}


def carry(o: PPO) -> dict[str, Array]:
    """The KL coefficient, which adapts to kl_target if that is set."""
    return {"kl_coef": jnp.float32(o.kl_coef)}


def ppo_step(stage: Stage[PPO], optimizer: optax.GradientTransformation) -> Step:
    """Training step of PPO on answers with advantages and returns, for policy and critic together.

    The weight of the KL in later rewards is carried from step to step, and follows what the batch's KL is.
    """
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: CriticBatch) -> tuple[Mean, dict[str, Mean]]:
        correction = None
        if o.corrects_sampler:
            correction = sampler_correction(batch.old_logp, batch.sampler_logp, batch.weights, o)
        policy = models["policy"].with_whole_tables()
        hidden = policy.hidden(batch.tokens, batch.positions, batch.segments)
        stats = token_logprobs(policy, batch, o.temperature, want_entropy=True, hidden=hidden)
        values, critic_aux = critic_values(models["critic"], batch, hidden[0])
        mean, metrics = ppo(
            stats.logp, values, batch.weights, batch.advantages, batch.returns, batch.old_logp, batch.values, o,
            correction=correction, entropy=stats.entropy,
            value_mask=with_end(batch.weights) if o.value_after_end else None, share=frozen.get("share"),
        )  # fmt: skip
        return mean, metrics | stats.aux | {f"critic_{name}": reported for name, reported in critic_aux.items()}

    def batch_stats(models: Models, frozen: Any, batch: CriticBatch) -> dict[str, Array]:
        return {"share": mask_share(batch.weights, with_end(batch.weights))}

    update = make_step(loss, stage, optimizer, batch_stats if o.value_after_end else None)

    def step(state: TrainState, batch: CriticBatch) -> tuple[TrainState, Metrics]:
        moved, metrics = update(state, batch)
        if not o.kl_target:
            return moved, metrics
        kl = (jnp.where(batch.weights > 0, batch.old_logp - batch.ref_logp, 0.0)).sum() / len(batch.tokens)
        # An answer counts once, whatever the number of epochs over it.
        answers = len(batch.tokens) / o.epochs
        kl_coef = adaptive_kl_coef(
            state.carry["kl_coef"], kl, target=o.kl_target, answers=answers, horizon=o.kl_horizon
        )
        return replace(moved, carry={"kl_coef": kl_coef}), metrics

    return step


def critic_values(
    critic: Scorer | ScoreHead, batch: TokenBatch, hidden: Float[Array, "B T D"] | None
) -> tuple[Float[Array, "B T"], Aux]:
    """The critic's value of the state before each token, and aux metrics of the critic's own layers.

    Args:
        hidden: the policy's, for a critic that is a head on it.
    """
    if isinstance(critic, ScoreHead):
        assert hidden is not None
        return token_values(hidden, critic), {}
    states, aux = critic.body.hidden(batch.tokens, batch.positions, batch.segments)
    return token_values(states, critic.score), aux


def ppo_rollout(
    sampled: Sampled,
    state: TrainState,
    tasks: Tasks,
    stage: Stage[PPO],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Rollout:
    """Score the answers to the prompts of the step, and prepare the batches of every update.

    Raises:
        UserError: a score is not finite; names the prompt.
    """
    o, (found, timeouts) = stage.objective, sampled
    host, count = (
        trajectory_batch(found, tasks.feed.prompt_len, o.max_new_tokens, tasks.feed.tokenizer.pad_id),
        len(found),
    )
    batch = to_devices(host, place, None, count)
    if o.corrects_sampler:  # advantages, and where ratios begin, is then the trainer's
        view = trainer_view(state.models["policy"], batch, o.temperature, stage.microbatches)
        host = replace(host, old_logp=np.asarray(fetch(view.logp)))
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
    batches = make_minibatches(CriticBatch(**vars(host) | per_token), o, key)
    found = [rescored(one, score) for one, score in zip(found, scores.tolist(), strict=True)]
    return Rollout(
        batches, found, advantages, np.arange(count), metrics, has_trainer_logp=o.corrects_sampler,
        rows=epoch_order(key, 0, count),
    )  # fmt: skip


def epoch_order(key: PRNGKeyArray, epoch: int, count: int) -> Int[np.ndarray, " B"]:
    """The random order of a rollout's `count` rows in an epoch."""
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), count))


def make_minibatches(batch: CriticBatch, o: PPO, key: PRNGKeyArray) -> list[CriticBatch]:
    """Minibatches of a rollout for all epochs; each epoch contains every row once, in a random order."""
    batches = []
    for epoch in range(o.epochs):
        order = epoch_order(key, epoch, len(batch.tokens))
        batches += [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in np.split(order, o.minibatches)]
    return batches


@functools.partial(jax.jit, static_argnames="o")
def advantages_and_returns(
    state: TrainState, batch: RolloutBatch, scores: Float[Array, " B"], o: PPO
) -> tuple[dict[str, Float[Array, "B T"]], dict[str, Array]]:
    """Advantages, returns, values and reference log-probabilities of a rollout, by batch field, and metrics."""
    policy, mask = state.models["policy"], batch.weights
    ref_logp = token_logprobs(reference_of(state.models, state.frozen), batch, o.temperature).logp * mask
    hidden = policy.hidden(batch.tokens, batch.positions, batch.segments)[0] if o.critic == "head" else None
    judged = with_end(mask) if o.value_after_end else mask
    values = critic_values(state.models["critic"], batch, hidden)[0] * judged
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


ALGORITHM = Algorithm(
    ppo_step,
    models,
    rollout=ppo_rollout,
    reads_reference=lambda o: True,  # in the rollout: the step finds its log-probabilities in the batch
    carry=carry,
    batch=lambda o: CriticBatch,
    keeps_scorers=True,
)
