"""Where a step's batches come from: the data, or a rollout of the model itself."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.data.pipeline import Feed, make_feed
from lm.data.tokenizer import Tokenizer
from lm.experiment import DPO, GRPO, Experiment, Stage, UserError, rows_per_update
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import own_rows, to_devices
from lm.parallel.rules import batch_sharding
from lm.rollout.environments import Environment, Rollout, make_environment, roll_out
from lm.train.metrics import MetricsLog
from lm.train.reference import REFERENCE, Known, known_of, with_reference
from lm.types import Batch

SAMPLER_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # largest |log p(sampler) - log p(trainer)|, in nats
AHEAD = 2  # steps whose batches are ready before they are asked for
GROUPS_SHOWN = 3  # groups of a rollout kept for people to read, each time


class Ahead:
    """batch(step) from a thread that has those of the next steps ready, up to `steps`; the same batches in any order.

    What `batch` raises is raised here, at its step. `close` ends the thread.
    """

    def __init__(self, batch: Callable[[int], Batch], steps: int):
        self._batch, self._steps = batch, steps
        self._thread: threading.Thread | None = None
        self._next = 0

    def __call__(self, step: int) -> Batch:
        if not 0 <= step < self._steps:
            return self._batch(step)
        if self._thread is None or step != self._next:
            self.close()
            self._stop, self._ready = threading.Event(), queue.Queue[tuple[Batch | None, BaseException | None]](AHEAD)
            self._thread = threading.Thread(target=self._work, args=(step, self._stop, self._ready), daemon=True)
            self._thread.start()
        batch, error = self._ready.get()
        self._next = step + 1
        if error is not None:
            self.close()
            raise error
        assert batch is not None
        return batch

    def _work(self, start: int, stop: threading.Event, ready: queue.Queue) -> None:
        for step in range(start, self._steps):
            if stop.is_set():
                return
            try:
                ready.put((self._batch(step), None))
            except BaseException as error:
                ready.put((None, error))
                return

    def close(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:  # makes room for the one batch that the thread may still be about to put
                self._ready.get_nowait()
        self._thread.join()
        self._thread = None


class Batches:
    """(step, model) -> the step's batches, one an update, and what was measured on the way.

    A pure function of the experiment, the step and the model: nothing to save, nothing to restore.
    """

    cost = "data_seconds"  # under which name the time that the loop waits for it is accounted

    def __init__(self, feed: Feed, count: int, mesh: Mesh, steps: int):
        self.count, self.place = count, batch_sharding(mesh)
        self.rows = own_rows(self.place, count)
        self.feed = feed
        self.batch = Ahead(self.make, steps)
        self.report, self.fingerprint = feed.report(), feed.fingerprint

    def prepare(self, model: Transformer, folder: Path, before: Callable[[str], None]) -> None:
        """What has to be known before the first step, of the model that enters the stage.

        Args:
            folder: the stage's, to keep it in.
            before: called with what comes next, before each thing that takes time; raises where the run should stop.
        """

    def make(self, step: int) -> Batch:
        """The rows of this process of a step's batch, on the host."""
        return self.feed.batch(step, self.rows)

    def __call__(self, step: int, model: Transformer) -> tuple[list[Batch], dict[str, float]]:
        return [to_devices(self.batch(step), self.place, self.rows, self.count)], {}

    def show(self, log: MetricsLog, step: int) -> None:
        """Write down what people may want to read; the data itself is shown by `lm data`."""

    def close(self) -> None:
        """End what works ahead of the loop."""
        self.batch.close()


class Referenced(Batches):
    """Batches with the log-probabilities of the model that enters the stage, of every example made once."""

    def __init__(self, stage: Stage, feed: Feed, count: int, mesh: Mesh):
        super().__init__(feed, count, mesh, stage.steps)
        self.stage = stage
        self.known: Known = {}

    def prepare(self, model: Transformer, folder: Path, before: Callable[[str], None]) -> None:
        self.known = known_of(self.feed, model, self.stage, self.place, folder / REFERENCE, before)

    def make(self, step: int) -> Batch:
        rows = range(self.count) if self.rows is None else self.rows.tolist()
        return with_reference(super().make(step), self.feed, step, rows, self.known)


class Rollouts(Batches):
    """Batches that the model samples and a verifier judges."""

    cost = "sample_seconds"

    def __init__(self, experiment: Experiment, index: int, tokenizer: Tokenizer, mesh: Mesh):
        self.place = batch_sharding(mesh)
        self.stage, self.tokenizer = experiment.stages[index], tokenizer
        self.key = jax.random.fold_in(jax.random.key(experiment.seed), index)
        self.environment: Environment = make_environment(self.stage, tokenizer, experiment.seed)
        self.report, self.fingerprint = self.environment.feed.report(), self.environment.feed.fingerprint
        self.latest: Rollout | None = None

    def __call__(self, step: int, model: Transformer) -> tuple[list[Batch], dict[str, float]]:
        key = jax.random.fold_in(self.key, step)
        self.latest = roll_out(model, self.environment, self.stage, self.tokenizer, step, key)
        # Every process has the whole rollout, and gives its devices their rows of it.
        batches = [to_devices(batch, self.place, None, len(batch.tokens)) for batch in self.latest.batches]
        return batches, self.latest.metrics

    def show(self, log: MetricsLog, step: int) -> None:
        for line in _groups(self.latest, self.stage, step) if self.latest else ():
            log.sample(line)

    def close(self) -> None:
        """Nothing: a rollout needs the model of its step, and its prompts cost nothing beside it."""


def make_batches(experiment: Experiment, index: int, tokenizer: Tokenizer, mesh: Mesh) -> Batches:
    """The batches of a stage, on the devices of the mesh; of several processes each makes the rows of its own.

    Raises:
        UserError: its data cannot be used; says which file, line or field.
    """
    stage = experiment.stages[index]
    if isinstance(stage.objective, GRPO):
        return Rollouts(experiment, index, tokenizer, mesh)
    feed, count = make_feed(stage, tokenizer, experiment.seed), rows_per_update(stage)
    if isinstance(stage.objective, DPO) and stage.objective.reference == "cached":
        return Referenced(stage, feed, count, mesh)
    return Batches(feed, count, mesh, stage.steps)


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
    if not isinstance(stage.objective, GRPO):
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
