"""Batches of every stage: from its data, or sampled by its model; and the check that sampler and trainer agree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.data.pipeline import make_feed
from lm.data.sources import NOWHERE
from lm.data.split import Places
from lm.data.tokenizer import Tokenizer
from lm.experiment import DPO, GRPO, PPO, Experiment, Sampled, Stage, UserError, rows_per_update
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import first, to_devices
from lm.parallel.rules import batch_sharding
from lm.rollout.environments import Environment, Rollout, make_environment, roll_out
from lm.rollout.experience import score_out
from lm.rollout.rounding import rounded
from lm.train.batches import Batches, Referenced
from lm.train.metrics import MetricsLog
from lm.types import Batch, TrainState

SAMPLER_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # largest |log p(sampler) - log p(trainer)|, in nats
NO_END = (
    "none of {count} answers of step {step} ended by itself: what is learnt of their ends is nothing; a longer max_new_tokens, "
    "or more instruction tuning before, helps (eos_rate in the metrics tells when it passes)"
)
TIMEOUTS = (
    "{count} rewards of step {step} took longer than {seconds:g} s (objective.reward_seconds) and count as 0; the metric "
    "reward_timeouts counts them"
)
GROUPS_SHOWN = 3  # groups of a rollout kept for people to read, each time


class Rollouts(Batches):
    """Batches that the model samples, and a verifier or reward models judge."""

    cost = "sample_seconds"

    def __init__(
        self, experiment: Experiment, index: int, tokenizer: Tokenizer, mesh: Mesh, elsewhere: Places = NOWHERE
    ):
        self.place = batch_sharding(mesh)
        self.stage, self.tokenizer = experiment.stages[index], tokenizer
        self.key = jax.random.fold_in(jax.random.key(experiment.seed), index)
        self.environment: Environment = make_environment(self.stage, tokenizer, experiment.seed, elsewhere)
        self.report, self.fingerprint = self.environment.feed.report(), self.environment.feed.fingerprint
        self.latest: Rollout | None = None
        self.warned = self.told_of_timeouts = False

    def __call__(self, step: int, state: TrainState) -> tuple[list[Batch], dict[str, float]]:
        key = jax.random.fold_in(self.key, step)
        o = self.stage.objective
        if isinstance(o, PPO):
            answered = score_out(state, self.environment, self.stage, self.tokenizer, step, key, self.place)
        else:
            assert isinstance(o, GRPO)
            model = state.params if o.sampler == "same" else rounded(state.params, o.sampler)
            answered = roll_out(model, self.environment, self.stage, self.tokenizer, step, key)
        self.latest = answered
        if answered.metrics["eos_rate"] == 0 and not self.warned and first():
            self.warned = True
            print(f"{self.stage.name}: {NO_END.format(step=step + 1, count=len(answered.answers))}", flush=True)
        if (late := answered.metrics.get("reward_timeouts", 0)) and not self.told_of_timeouts and first():
            self.told_of_timeouts = True
            print(
                f"{self.stage.name}: {TIMEOUTS.format(step=step + 1, count=int(late), seconds=o.reward_seconds)}",
                flush=True,
            )
        # Every process has the whole rollout, and gives its devices their rows of it.
        batches = [to_devices(batch, self.place, None, len(batch.tokens)) for batch in self.latest.batches]
        if isinstance(o, GRPO) and o.sampler != "same":
            batches = [seen_by_trainer(state.params, batch, o.temperature) for batch in batches]
        return batches, self.latest.metrics

    def show(self, log: MetricsLog, step: int) -> None:
        for line in _groups(self.latest, self.stage, step) if self.latest else ():
            log.sample(line)

    def close(self) -> None:
        """Nothing: a rollout needs the model of its step, and its prompts cost nothing beside it."""


def make_batches(
    experiment: Experiment, index: int, tokenizer: Tokenizer, mesh: Mesh, elsewhere: Places = NOWHERE
) -> Batches:
    """The batches of a stage, on the devices of the mesh; of several processes each makes the rows of its own.

    Args:
        elsewhere: what other sources of the experiment hold out (`held_out_elsewhere`), which is left out of training.

    Raises:
        UserError: its data cannot be used; says which file, line or field.
    """
    stage = experiment.stages[index]
    if isinstance(stage.objective, Sampled):
        return Rollouts(experiment, index, tokenizer, mesh, elsewhere)
    feed, count = make_feed(stage, tokenizer, experiment.seed, elsewhere=elsewhere), rows_per_update(stage)
    if isinstance(stage.objective, DPO) and stage.objective.reference == "cached":
        return Referenced(stage, feed, count, mesh)
    return Batches(feed, count, mesh, stage.steps)


@functools.partial(jax.jit, static_argnames="temperature")
def seen_by_trainer(model: Transformer, batch: Batch, temperature: float) -> Batch:
    """The batch with the old policy being the trainer's, where the sampler was another."""
    logp = token_logprobs(model, batch, temperature).logp * batch.weights
    return dataclasses.replace(batch, old_logp=logp, sampler_logp=batch.old_logp)


def _groups(rollout: Rollout, stage: Stage, step: int) -> Iterator[dict[str, Any]]:
    size = stage.objective.group_size if isinstance(stage.objective, GRPO) else 1
    when = "after" if step == stage.steps else "during"
    for start in range(0, min(len(rollout.prompts), GROUPS_SHOWN * size), size):
        completions = [
            {
                "text": rollout.answers[i].text,
                "eos": rollout.answers[i].eos,
                "reward": float(rollout.rewards[i]),
                "advantage": float(rollout.advantages[i]),
            }
            for i in range(start, start + size)
        ]
        yield {
            "kind": "rollout",
            "step": step,
            "when": when,
            "prompt": rollout.prompts[start],
            "completions": completions,
        }


def check_sampler(model: Transformer, batch: Batch, stage: Stage, dtype: str) -> None:
    """Stop unless the sampler's log-probabilities are the trainer's, on the same tokens; other stages pass.

    Raises:
        UserError: says by how much they differ.
    """
    if not isinstance(stage.objective, Sampled):
        return
    gap = sampler_gap(model, batch, stage.objective.temperature)
    if not gap <= SAMPLER_TOLERANCE[dtype]:
        raise UserError(
            f"{stage.name}: sampler and trainer disagree by {gap:.2g} nats on a token's log-probability "
            f"({SAMPLER_TOLERANCE[dtype]:g} is allowed in {dtype}): the gradient would be of another policy"
        )


def sampler_gap(model: Transformer, batch: Batch, temperature: float) -> float:
    """Largest |log p(sampler) - log p(trainer)| over the sampled tokens, in nats."""

    @jax.jit
    def largest(model: Transformer, batch: Batch, old_logp: jax.Array) -> jax.Array:
        logp = token_logprobs(model, batch, temperature).logp
        return jnp.max(jnp.where(batch.weights > 0, jnp.abs(logp - old_logp), 0.0))

    assert batch.old_logp is not None
    return float(largest(model, batch, batch.old_logp))
