"""Makes the batches of a stage, from data or by rollout, and checks that sampler and trainer log-probabilities agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm.algorithms import algorithm_of
from lm.algorithms.algorithm import reference_of
from lm.data.pipeline import make_feed
from lm.data.sources import NOWHERE
from lm.data.split import Places
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import (
    Experiment,
    Model,
    Stage,
    UserError,
    rows_per_update,
)
from lm.model.heads import policy_of
from lm.model.lora import merged
from lm.model.transformer import Transformer
from lm.parallel.distributed import fetch, to_devices
from lm.parallel.mesh import sampler_mesh
from lm.parallel.rules import batch_sharding
from lm.rollout.endpoint_judge import JudgeRecord
from lm.rollout.engine import LocalEngine
from lm.rollout.episodes import Sampled, Tasks, make_tasks
from lm.rollout.rounding import rounded
from lm.rollout.sampler_gap import (
    GapBound,
    SamplerGap,
    TrainerView,
    agreement,
    is_suspicious,
    precision,
    sampler_gap,
    trainer_view,
)
from lm.rollout.trajectory import Rollout, staleness_metrics, trajectory_batch
from lm.train.batches import Batches, CachedReferenceBatches
from lm.train.checkpoint import Checkpoints
from lm.train.metrics import MetricsLog
from lm.train.rollouts_ahead import EngineOn, RolloutsAhead
from lm.train.trajectory_writer import TokenNumbers, keep_trajectories, token_numbers
from lm.train_step import TrainState
from lm.types import CriticBatch, RolloutBatch

_merged = jax.jit(merged, static_argnames="dtype")
GROUPS_SHOWN = 3  # groups of a rollout that are logged as samples


class RolloutBatches(Batches):
    """Batches of rollouts: completions sampled by the model, with rewards of a verifier or reward models."""

    cost = "sample_seconds"

    def __init__(
        self, experiment: Experiment, index: int, tokenizer: TextTokenizer, mesh: Mesh, elsewhere: Places = NOWHERE
    ):
        self.place, self.notes = batch_sharding(mesh), {}
        self.stage, self.tokenizer, self.layout = experiment.stages[index], tokenizer, experiment.rollout_mesh
        self.key = jax.random.fold_in(jax.random.key(experiment.seed), index)
        self.tasks: Tasks = make_tasks(self.stage, tokenizer, experiment.seed, elsewhere)
        feed = self.tasks.feed
        self.report, self.sources, self.fingerprint = self.tasks.report(), feed.sources(), feed.fingerprint
        self.latest: Rollout | None = None
        self.folder: Path | None = None
        self.judged: JudgeRecord | None = None
        self.agreement: GapBound | None = None  # the latest float32 comparison of sampler and trainer
        alone = sampler_mesh(experiment.rollout_mesh) if self.stage.objective.staleness else None
        self.alone, self.sampler_mesh = alone is not None, alone or mesh
        self.ahead = RolloutsAhead(self.stage, self._sample_checked, alone) if self.stage.objective.staleness else None

    def prepare(self, model: Transformer, folder: Path, before: Callable[[str], None]) -> None:
        self.folder = folder
        if any(name.startswith("endpoint:") for name in self.stage.objective.verifier_names):
            self.judged = JudgeRecord(folder, jax.process_index())

    def __call__(self, step: int, state: TrainState) -> tuple[list[RolloutBatch], dict[str, float]]:
        key, o, algorithm = jax.random.fold_in(self.key, step), self.stage.objective, algorithm_of(self.stage)
        model = policy_of(state.models)
        ahead = self.ahead.of_step(step, model, state.frozen) if self.ahead else None
        sampled = ahead.sampled if ahead else self._sample(model, state.frozen, step, step)
        self.latest = algorithm.rollout(sampled, state, self.tasks, self.stage, step, key, self.place)
        # Every process has the whole rollout and places its own devices' rows.
        batches = [to_devices(batch, self.place, None, len(batch.tokens)) for batch in self.latest.batches]
        if not self.latest.trajectories:  # nothing was sampled
            return batches, self.latest.metrics
        once = batches[: o.updates_per_epoch]  # the first epoch: each row of the rollout once
        pieces = self.stage.microbatches
        views = [trainer_view(model, batch, o.temperature, pieces) for batch in once]
        if self.folder:
            numbers = self._token_numbers(self.latest, state, once, views)
            self.notes |= keep_trajectories(self.folder, self.stage, step + 1, self.latest, numbers)
        if ahead:
            gap = ahead.metrics | staleness_metrics(sampled.trajectories, step)
            gap |= sampler_gap(views, once, precision(model.config)).metrics("log_ratio")
        else:
            gap = self._checked_gap(model, views, once, step, pieces)
        if o.corrects_sampler and not self.latest.has_trainer_logp:
            batches = [with_trainer_logp(batch, view) for batch, view in zip(batches, views, strict=True)]
        return batches, self.latest.metrics | gap

    def _sample(self, model: Transformer, frozen: Mapping[str, Any], step: int, version: int) -> Sampled:
        """Completions of a step by the policy `model` after `version` steps, with their rewards; `frozen` is that of the state."""
        o = self.stage.objective
        with jax.set_mesh(self.sampler_mesh):
            whole = _merged(model, model.config.compute_dtype) if self.stage.lora.merge_for_sampling else model
            sampler = whole if o.samples_as_trained else rounded(whole, o.sampler)
        local = LocalEngine(sampler, self.tokenizer, version, layout=self.layout, cache=o.sampler_cache)
        engine = EngineOn(local, self.sampler_mesh) if self.alone else local
        key, tasks = jax.random.fold_in(self.key, step), self.tasks
        if self.judged:
            tasks = dataclasses.replace(tasks, spec=dataclasses.replace(tasks.spec, record=self.judged.at(step)))
        return algorithm_of(self.stage).sample(engine, frozen, tasks, self.stage, step, key, self.place)

    def _sample_checked(
        self, model: Transformer, frozen: Mapping[str, Any], step: int, version: int
    ) -> tuple[Sampled, dict[str, float]]:
        """`_sample`, and the gap of sampler and trainer for the weights that sampled, which no later step has."""
        sampled, o, feed = self._sample(model, frozen, step, version), self.stage.objective, self.tasks.feed
        size, pieces = self.stage.batch_size * o.completions_per_prompt, self.stage.microbatches * o.updates_per_epoch
        batches = []
        for start in range(0, len(sampled.trajectories), size):
            rows = sampled.trajectories[start : start + size]
            batch = trajectory_batch(rows, feed.prompt_len, o.max_new_tokens, feed.tokenizer.pad_id)
            batches.append(to_devices(batch, batch_sharding(self.sampler_mesh), None, size))
        with jax.set_mesh(self.sampler_mesh):
            views = [trainer_view(model, batch, o.temperature, pieces) for batch in batches]
            return sampled, self._checked_gap(model, views, batches, step, pieces) if batches else {}

    def _checked_gap(
        self, model: Transformer, views: list[TrainerView], batches: list[RolloutBatch], step: int, pieces: int
    ) -> dict[str, float]:
        """Metrics of the gap between sampler and trainer. Raises UserError if rounding does not explain it."""
        gap, o = sampler_gap(views, batches, precision(model.config)), self.stage.objective
        if o.samples_as_trained and is_suspicious(gap, self.agreement):
            self.agreement = agreement(model, views, batches, gap, o.temperature, pieces)
            self._check(gap, self.agreement, step, model.config)
        return gap.metrics()

    def resume(self, meta: Mapping[str, Any]) -> None:
        if self.ahead and self.folder:
            self.ahead.resume(self.folder, meta)

    def work_ahead(self, step: int) -> None:
        if self.ahead:
            self.ahead.sample_next(step)

    def record(self, step: int, checkpoints: Checkpoints) -> dict[str, Any]:
        return self.ahead.record(step, checkpoints) if self.ahead else {}

    def _token_numbers(
        self, rollout: Rollout, state: TrainState, batches: list[RolloutBatch], views: list[TrainerView]
    ) -> TokenNumbers:
        """What the trajectory file keeps of the trainer's numbers; the reference's log-probabilities if the step reads them."""
        if not self.stage.trajectory_mb:
            return {}
        algorithm, o = algorithm_of(self.stage), self.stage.objective
        columns = {"trainer_logp": [view.logp for view in views]}
        if issubclass(algorithm.batch(o), CriticBatch):
            columns["ref_logp"] = [vars(batch)["ref_logp"] for batch in batches]
            columns["token_advantages"] = [batch.advantages for batch in batches]
        elif algorithm.reads_reference(o):
            reference, pieces = reference_of(state.models, state.frozen), self.stage.microbatches
            columns["ref_logp"] = [trainer_view(reference, batch, o.temperature, pieces).logp for batch in batches]
        rows = rollout.chosen if rollout.rows is None else rollout.rows
        return token_numbers(rows, rollout.batches[: len(batches)], fetch(columns))

    def _check(self, gap: SamplerGap, found: GapBound, step: int, config: Model) -> None:
        """Raise UserError if rounding does not explain the sampler gap; with importance correction, only note a warning."""
        if found.holds:
            return
        where, o = self.stage.name, self.stage.objective
        told = (
            f"the sampler's log-probabilities of the tokens of step {step + 1} differ from the trainer's by {gap.mean:.2g} nats "
            f"on average (99th percentile {gap.p99:.2g}, largest {gap.largest:.2g}), {found.found / found.allowed:.1f} times as "
            f"much as rounding in {config.compute_dtype} at temperature {o.temperature:g} may make"
        )
        if not o.tis_clip:
            corrected = f"{where}.objective.tis_clip 2 corrects for it by importance weights; "
            raise UserError(
                f"{where}: {told}: gradients would be of another policy. {corrected if o.has_ratios else ''}model.compute_dtype "
                "float32 reduces rounding"
            )
        self.notes["sampler_gap"] = f"{told}: importance weights up to {o.tis_clip:g} (tis_clip) correct for it"

    def show(self, log: MetricsLog, step: int) -> None:
        log.samples(list(_groups(self.latest, self.stage, step)) if self.latest else [])

    def close(self) -> None:
        """Nothing to stop: no thread samples."""


def make_batches(
    experiment: Experiment, index: int, tokenizer: TextTokenizer, mesh: Mesh, elsewhere: Places = NOWHERE
) -> Batches:
    """Make the batches of a stage on the devices of the mesh; each process makes only the rows of its devices.

    Args:
        elsewhere: keys held out by other sources of the experiment (`held_out_elsewhere`), which are not trained on.

    Raises:
        UserError: the stage's data cannot be used; names the file, line or field.
    """
    stage = experiment.stages[index]
    if stage.objective.samples:
        return RolloutBatches(experiment, index, tokenizer, mesh, elsewhere)
    feed, count = make_feed(stage, tokenizer, experiment.seed, elsewhere=elsewhere), rows_per_update(stage)
    if stage.objective.caches_reference:
        return CachedReferenceBatches(stage, feed, count, mesh)
    return Batches(feed, count, mesh, stage.steps)


def with_trainer_logp(batch: RolloutBatch, view: TrainerView) -> RolloutBatch:
    """Replace a batch's `old_logp` by the trainer's log-probabilities; the sampler's stay in `sampler_logp`."""
    return dataclasses.replace(batch, old_logp=view.logp)


def _groups(rollout: Rollout, stage: Stage, step: int) -> Iterator[dict[str, Any]]:
    size = stage.objective.completions_per_prompt
    when = "after" if step == stage.steps else "during"
    for start in range(0, min(len(rollout.chosen), GROUPS_SHOWN * size), size):
        group = rollout.chosen[start : start + size]
        members = [rollout.trajectories[i] for i in group]
        completions = [
            {"text": one.text, "eos": one.ended, "reward": float(np.float32(one.reward)), "advantage": float(advantage)}
            for one, advantage in zip(members, rollout.advantages[group], strict=True)
        ]
        yield {
            "kind": "rollout",
            "step": step,
            "when": when,
            "prompt": members[0].prompt,
            "completions": completions,
        }
