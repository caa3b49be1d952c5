"""Rollouts of later steps, sampled while a step trains, with weights that are `max_staleness` steps old.

The rollout of step s (from 0) is sampled with the weights after max(0, s - max_staleness) steps of the stage, whatever the timing: a run
is a function of the experiment. Step s begins with a copy of its weights, dispatches its updates, and while the devices
compute them, the rollout of step s + max_staleness is sampled with the copy. It is logged before any step uses it
(`rollout_log.py`), and is used as it was logged, so that a resumed run, which reads the log, does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.experiment import Stage
from lm.model.transformer import Transformer
from lm.rollout.episodes import Sampled
from lm.train import rollout_log
from lm.train.checkpoint import Checkpoints
from lm.train.rollout_log import AHEAD
from lm.train_step import combine, partition

Sample = Callable[[Transformer, Mapping[str, Any], int, int], tuple[Sampled, Mapping[str, float]]]
"""(policy, frozen models, step, version) -> completions of the step, rewarded, and metrics of their sampling."""

_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class RolloutAhead(NamedTuple):
    """A rollout as it was logged: completions, and metrics of their sampling."""

    sampled: Sampled
    metrics: dict[str, float]


class RolloutsAhead:
    """The rollouts of a stage with `max_staleness` above 0."""

    def __init__(self, stage: Stage, sample: Sample):
        self.stage, self.most, self.sample = stage, stage.objective.staleness, sample
        self.folder = Path()
        self.ready: dict[int, RolloutAhead] = {}
        self.names: dict[int, str] = {}  # the files of these rollouts, and of the step that trains
        self.needed: set[int] = set()  # steps whose files checkpoints need
        self.models: tuple[Transformer, Mapping[str, Any]] | None = None  # those before the step that trains

    def resume(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """Read the rollouts that a checkpoint needs. Raises UserError if one is missing or damaged."""
        self.folder = folder
        self.names = {int(step): name for step, name in meta.get(AHEAD, {}).items()}
        for number, content in rollout_log.read(folder, self.names.values()).items():
            self.ready[number - 1] = RolloutAhead(*rollout_log.decode(content))
        self.needed = set(range(min(self.names, default=0)))  # the files of earlier checkpoints are kept
        self._prune()

    def of_step(self, step: int, policy: Transformer, frozen: Mapping[str, Any]) -> RolloutAhead:
        """The rollout of a step, before which the stage has these models; the rollouts of the first steps are sampled now."""
        for first in range(step, min(step + self.most, self.stage.steps)):
            if first not in self.ready:
                self._sample(policy, frozen, first, step)
        trained, fixed = partition({"policy": policy}, self.stage)
        self.models = combine(_copied(trained), fixed)["policy"], frozen  # the step donates what it trains
        self.names = {one: name for one, name in self.names.items() if one >= step or one in self.needed}
        self._prune()
        return self.ready.pop(step)

    def sample_next(self, step: int) -> None:
        """Sample the rollout of step `step` + `max_staleness` with the weights before step `step`."""
        later = step + self.most
        if later < self.stage.steps and self.models is not None:
            self._sample(*self.models, later, step)
        self.models = None

    def record(self, step: int, checkpoints: Checkpoints) -> dict[str, Any]:
        """What the meta of a checkpoint after `step` steps has: the names of the files that a run resumed from it needs."""
        checkpoints.wait()  # its newest one needs files too
        self.needed = {one for start in (*checkpoints.steps(), step) for one in range(start, start + self.most)}
        self._prune()
        return {AHEAD: {str(one): name for one, name in self.names.items() if one >= step}}

    def _sample(self, policy: Transformer, frozen: Mapping[str, Any], step: int, version: int) -> None:
        content = rollout_log.encode(*self.sample(policy, frozen, step, version))
        self.names[step] = rollout_log.write(self.folder, step + 1, content)
        self.ready[step] = RolloutAhead(*rollout_log.decode(content))

    def _prune(self) -> None:
        rollout_log.prune(self.folder, self.names.values(), {step + 1 for step in self.needed})
