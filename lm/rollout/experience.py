"""A rollout for PPO: answers sampled by the policy, scored whole, and what each of their tokens was worth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from lm.data.chat import prompt_messages
from lm.data.tokenizer import Tokenizer
from lm.experiment import PPO, Stage, UserError
from lm.model.scorer import Scorer
from lm.objectives.logprobs import last_scores, token_logprobs
from lm.objectives.ppo import experience, explained_variance, token_rewards
from lm.parallel.distributed import fetch, to_devices
from lm.rollout.environments import Environment, Rollout, as_batch, judge
from lm.rollout.sampler import decode_rows, generate
from lm.steps import critic_values
from lm.types import Batch, TrainState

ENSEMBLES: dict[str, Callable[..., Array]] = {"mean": jnp.mean, "min": jnp.min}


def score_out(
    state: TrainState,
    environment: Environment,
    stage: Stage,
    tokenizer: Tokenizer,
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Rollout:
    """Sample an answer to each prompt of the step, score it, and prepare the batches of every update.

    Raises:
        UserError: a score is not finite; names the prompt.
    """
    o = stage.objective
    assert isinstance(o, PPO)
    prompts = environment.prompts(step)
    samples = fetch(
        generate(
            state.params["policy"], prompts.tokens, prompts.lengths, key, o.temperature,
            max_new_tokens=o.max_new_tokens, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
        )
    )  # fmt: skip
    answers = decode_rows(tokenizer, samples.tokens, samples.mask)
    asked = [prompt_messages(row, "the prompt")[-1]["content"] for row in prompts.rows]
    host = as_batch(prompts.tokens, prompts.lengths, samples, np.zeros(len(answers), np.float32))
    batch = to_devices(host, place, None, len(answers))
    judged = judge(environment, prompts.rows, answers) if o.verifier else None
    scores = judged if judged is not None and not o.reward_models else None
    if scores is None:
        scores = np.asarray(fetch(score_rows(state.frozen["scorers"], batch, o.ensemble)))
    _check_finite(scores, asked, stage, step)
    ended = np.array([answer.eos for answer in answers])
    counted = (scores - o.missing_eos_penalty * ~ended).astype(np.float32)
    worth, stats = _worth(state, batch, to_devices(counted, place, None, len(answers)), o)
    worth = fetch(worth)
    metrics = {name: float(value) for name, value in fetch(stats).items()}
    metrics |= {"score": float(scores.mean()), "eos_rate": float(ended.mean())}
    metrics["completion_length"] = float(samples.mask.sum(1).mean())
    if judged is not None:
        metrics["judge"] = float(judged.mean())
    advantages = worth["advantages"].sum(1) / np.maximum(host.weights.sum(1), 1)
    return Rollout(gone_through(replace(host, **worth), o, key), asked, answers, scores, advantages, metrics)


def gone_through(batch: Batch, o: PPO, key: PRNGKeyArray) -> list[Batch]:
    """A rollout as the batches of its updates: every row once an epoch, in an order of its own."""
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
def _worth(
    state: TrainState, batch: Batch, scores: Float[Array, " B"], o: PPO
) -> tuple[dict[str, Float[Array, "B T"]], dict[str, Array]]:
    """What an update reads of a rollout, by the name of the batch's field, and what is reported of it."""
    policy, mask = state.params["policy"], batch.weights
    assert batch.old_logp is not None
    ref_logp = token_logprobs(state.frozen["reference"], batch, o.temperature).logp * mask
    # The policy's hidden states are only needed for a head on them; else they are not computed.
    hidden = policy.hidden(batch.tokens, batch.positions, batch.segments) if o.critic == "head" else batch.tokens
    values = critic_values(state.params["critic"], batch, hidden) * mask
    kl_coef = state.opt_state["kl_coef"]
    rewards = token_rewards(scores, batch.old_logp, ref_logp, mask, kl_coef, o.kl_estimator)
    advantages, returns = experience(rewards, values, mask, gamma=o.gamma, lam=o.lam, whiten_rewards=o.whiten_rewards)
    worth = {"advantages": advantages, "returns": returns * mask, "values": values, "ref_logp": ref_logp}
    stats = {
        "kl": ((batch.old_logp - ref_logp) * mask).sum(1).mean(),
        "reward": rewards.sum(1).mean(),
        "explained_variance": explained_variance(values, returns, mask),
        "kl_coef": kl_coef,
    }
    return worth, stats


def _check_finite(scores: Float[np.ndarray, " B"], asked: list[str], stage: Stage, step: int) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"{stage.name}: the reward of {len(bad)} of {len(scores)} answers is {scores[bad[0]]} at step {step + 1}, the first "
            f"to {asked[bad[0]]!r:.60}; the last good checkpoint is kept. A reward has to be finite: look at the reward model"
        )
