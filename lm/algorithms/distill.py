"""Distillation (GKD): the student learns the teacher's next-token distributions, on its own samples or on answers of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray

from lm.algorithms.algorithm import Algorithm, reference_of, sample_once
from lm.experiment import Distill, Stage
from lm.objectives.cross_entropy import weighted
from lm.objectives.distill import token_divergence
from lm.rollout.engine import Engine
from lm.rollout.episodes import Sampled, Tasks
from lm.rollout.rewards import timeout_metric
from lm.rollout.trajectory import (
    MODEL,
    PROMPT,
    STOP,
    Rollout,
    Trajectory,
    rewards_of,
    sample_metrics,
    trajectory_batch,
)
from lm.train_step import Models, Step, TrainState, make_step
from lm.types import DistillBatch, Mean, TokenBatch, array_fields

CHOICE = 2**30  # folded into a step's key for the choice between samples and data


def distill_step(stage: Stage[Distill], optimizer: optax.GradientTransformation) -> Step:
    """Training step of distillation: the divergence from the frozen teacher at every token of the completions."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: DistillBatch) -> tuple[Mean, dict[str, Mean]]:
        teacher = frozen["teacher"] if o.teacher else reference_of(models, frozen)
        stats = token_divergence(models["policy"], teacher, batch, o)
        metrics = {
            "teacher_agreement": weighted(stats.agrees, batch.weights),
            "entropy": weighted(stats.entropy, batch.weights),
            "teacher_entropy": weighted(stats.teacher_entropy, batch.weights),
        }
        return weighted(stats.divergence, batch.weights), metrics | stats.aux

    return make_step(loss, stage, optimizer)


def distill_sample(
    engine: Engine,
    frozen: Mapping[str, Any],
    tasks: Tasks,
    stage: Stage[Distill],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Sampled:
    """Sample a completion of each prompt of the step, or nothing, by chance (GKD, arXiv:2306.13649, algorithm 1)."""
    if float(jax.random.uniform(jax.random.fold_in(key, CHOICE))) < stage.objective.on_policy:
        return sample_once(engine, frozen, tasks, stage, step, key, place)
    return Sampled([], 0)


def distill_rollout(
    sampled: Sampled,
    state: TrainState,
    tasks: Tasks,
    stage: Stage[Distill],
    step: int,
    key: PRNGKeyArray,
    place: NamedSharding,
) -> Rollout:
    """The batch of a step's sampled completions, or of the data's answers if nothing was sampled."""
    o, (found, timeouts) = stage.objective, sampled
    metrics: dict[str, float] = {}
    if found:
        metrics = sample_metrics(found) | timeout_metric(timeouts)
        metrics |= {"reward": float(rewards_of(found).mean())} if o.verifier else {}
    completions = found or data_trajectories(tasks, step, o.max_new_tokens)
    batch = distill_batch(completions, tasks, step, o.max_new_tokens)
    return Rollout([batch], found, np.zeros(len(found)), np.arange(len(found)), metrics)


def data_trajectories(tasks: Tasks, step: int, most: int) -> list[Trajectory]:
    """The answers that the data has to the prompts of a step, as if sampled; those longer than `most` tokens are cut off."""
    prompts, answer = tasks.feed.batch(step), tasks.answer
    assert answer is not None
    found = []
    for row, tokens, length in zip(prompts.rows, prompts.tokens, prompts.lengths, strict=True):
        prompt, answered = (
            tokens[len(tokens) - length :].tolist(),
            answer(row, f"{tasks.spec.where}, step {step + 1}")[:most],
        )
        authors = [PROMPT] * len(prompt) + [MODEL] * len(answered)
        found.append(
            Trajectory(
                row, (), np.array(prompt + answered, np.int32), np.array(authors, np.int8),
                np.zeros(len(authors), np.float32), STOP, step,
            )
        )  # fmt: skip
    return found


def distill_batch(completions: Sequence[Trajectory], tasks: Tasks, step: int, width: int) -> DistillBatch:
    """The batch of an update. The teacher's prompts, where they differ, have as many columns, so that completions are aligned."""

    def rows(some: Sequence[Trajectory]) -> Any:
        return trajectory_batch(some, tasks.feed.prompt_len, width, tasks.feed.tokenizer.pad_id)

    student = rows(completions)
    teacher = rows(with_prompts(completions, tasks, step)) if tasks.privileged_feed else student
    arrays = {name: getattr(teacher, name) for name in array_fields(TokenBatch)}
    return DistillBatch(**vars(student), teacher=TokenBatch(**arrays, shared=teacher.shared))


def with_prompts(completions: Sequence[Trajectory], tasks: Tasks, step: int) -> list[Trajectory]:
    """The completions of a step's tasks after the teacher's prompts, their tokens unchanged."""
    assert tasks.privileged_feed is not None
    prompts = tasks.privileged_feed.batch(step)
    found = []
    for one, tokens, length in zip(completions, prompts.tokens, prompts.lengths, strict=True):
        after = one.prompt_length
        found.append(
            dataclasses.replace(
                one,
                tokens=np.concatenate([tokens[len(tokens) - length :], one.tokens[after:]]),
                authors=np.concatenate([np.full(length, PROMPT, np.int8), one.authors[after:]]),
                logp=np.concatenate([np.zeros(length, np.float32), one.logp[after:]]),
            )
        )
    return found


ALGORITHM = Algorithm(
    distill_step,
    sample=distill_sample,
    rollout=distill_rollout,
    reads_reference=lambda o: not o.teacher,
    batch=lambda o: DistillBatch,
    extra_forward_passes=lambda o: 1,
)
