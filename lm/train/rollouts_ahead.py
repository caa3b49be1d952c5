"""Rollouts of later steps, sampled while a step trains, with weights that are `max_staleness` steps old.

The rollout of step s (from 0) is sampled with the weights after max(0, s - max_staleness) steps of the stage, whatever the timing: a run
is a function of the experiment. Step s begins with a copy of its weights, dispatches its updates, and while the devices
compute them, the rollout of step s + max_staleness is sampled with the copy. It is logged before any step uses it
(`rollout_log.py`), and is used as it was logged, so that a resumed run, which reads the log, does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.experiment import Stage
from lm.model.transformer import Transformer
from lm.parallel.rules import shardings
from lm.rollout.engine import Completion, Engine, Request
from lm.rollout.episodes import Sampled
from lm.train import rollout_log
from lm.train.checkpoint import Checkpoints
from lm.train.rollout_log import AHEAD
from lm.train_step import combine, partition

Sample = Callable[[Transformer, Mapping[str, Any], int, int], tuple[Sampled, Mapping[str, float]]]
"""(policy, frozen models, step, version) -> completions of the step, rewarded, and metrics of their sampling."""

_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


@dataclass(frozen=True)
class EngineOn:
    """An engine whose model is on the devices of another mesh than the current one."""

    engine: Engine
    mesh: Mesh

    def complete(self, request: Request) -> list[Completion]:
        """See `Engine`."""
        key = jax.device_put(request.key, NamedSharding(self.mesh, PartitionSpec()))
        with jax.set_mesh(self.mesh):
            return self.engine.complete(replace(request, key=key))


class RolloutAhead(NamedTuple):
    """A rollout as it was logged: completions, and metrics of their sampling."""

    sampled: Sampled
    metrics: dict[str, float]


class RolloutsAhead:
    """The rollouts of a stage with `max_staleness` above 0."""

    def __init__(self, stage: Stage, sample: Sample, mesh: Mesh | None = None):
        """`mesh` has the devices that only sample; None: sampling and training take turns."""
        self.stage, self.most, self.sample, self.mesh = stage, stage.objective.staleness, sample, mesh
        self.folder = Path()
        self.ready: dict[int, RolloutAhead] = {}
        self.names: dict[int, str] = {}  # the files of these rollouts, and of the step that trains
        self.needed: set[int] = set()  # steps whose files checkpoints need
        self.fixed: Any = None  # parameters that do not train, on the sampler's devices
        self.models: tuple[Transformer, Mapping[str, Any]] | None = None  # those before the step that trains

    def resume(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """Read the rollouts that a checkpoint needs. Raises UserError if one is missing or damaged."""
        self.folder = folder
        self.names = {int(step): name for step, name in meta.get(AHEAD, {}).items()}
        for number, found in rollout_log.read(folder, self.names.values()).items():
            self.ready[number - 1] = RolloutAhead(*found)
        self.needed = set(range(max(self.names, default=-1) + 1))  # by this checkpoint and earlier ones
        self._prune()

    def of_step(self, step: int, policy: Transformer, frozen: Mapping[str, Any]) -> RolloutAhead:
        """The rollout of a step, before which the stage has these models; the rollouts of the first steps are sampled now."""
        self.models = self._copy(policy), frozen
        for first in range(step, min(step + self.most, self.stage.steps)):
            if first not in self.ready:
                self._sample(*self.models, first, step)
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

    def _copy(self, policy: Transformer) -> Transformer:
        """The policy with its trained parameters copied, which the step donates, on the devices that sample."""
        trained, fixed = partition({"policy": policy}, self.stage)
        if self.mesh is None:
            return combine(_copied(trained), fixed)["policy"]
        self.fixed = _moved(fixed, self.mesh) if self.fixed is None else self.fixed
        return combine(_moved(trained, self.mesh), self.fixed)["policy"]

    def _sample(self, policy: Transformer, frozen: Mapping[str, Any], step: int, version: int) -> None:
        content = rollout_log.encode(*self.sample(policy, frozen, step, version))
        self.names[step] = rollout_log.write(self.folder, step + 1, content)
        self.ready[step] = RolloutAhead(*rollout_log.decode(content))

    def _prune(self) -> None:
        rollout_log.prune(self.folder, self.names.values(), {step + 1 for step in self.needed})


def _moved(tree: Any, mesh: Mesh) -> Any:
    return jax.device_put(tree, shardings(jax.eval_shape(lambda tree: tree, tree), mesh))
