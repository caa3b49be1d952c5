"""Batches of a training stage, prefetched in a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lm.data.pipeline import Feed
from lm.experiment import Stage
from lm.model.transformer import Transformer
from lm.parallel.distributed import own_rows, to_devices
from lm.parallel.rules import batch_sharding
from lm.train.checkpoint import Checkpoints
from lm.train.metrics import MetricsLog
from lm.train.reference import REFERENCE, ReferenceLogps, add_ref_logp, precompute_reference_logps
from lm.train_step import TrainState
from lm.types import TokenBatch

PREFETCH_STEPS = 2  # steps whose batches are prefetched


class Prefetcher:
    """Prefetches `batch(step)` of the next steps in a thread; any order of steps gives the same batches.

    An exception of `batch` is raised by the call for its step. `close` ends the thread.

    Args:
        batch: a pure function of the step.
        steps: number of steps; later ones are not prefetched.
    """

    def __init__(self, batch: Callable[[int], TokenBatch], steps: int):
        self._batch, self._steps = batch, steps
        self._thread: ThreadPoolExecutor | None = None
        self._ready: dict[int, Future[TokenBatch]] = {}

    def __call__(self, step: int) -> TokenBatch:
        if not 0 <= step < self._steps:
            return self._batch(step)
        if self._thread is None or step not in self._ready:
            self.close()
            self._thread = ThreadPoolExecutor(1, "batches")
        for ahead in range(step, min(step + PREFETCH_STEPS + 1, self._steps)):
            if ahead not in self._ready:
                self._ready[ahead] = self._thread.submit(self._batch, ahead)
        try:
            return self._ready.pop(step).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = None
        self._ready.clear()


class Batches:
    """Source of batches: (step, state) -> the step's batches, one per update, and metrics.

    A pure function of the experiment, the step and the state before it: nothing to save, nothing to restore.
    """

    cost = "data_seconds"  # goodput category of the time that the loop waits for batches

    def __init__(self, feed: Feed, count: int, mesh: Mesh, steps: int):
        # Warnings about the latest batches (kind -> text), which the loop logs and clears.
        self.notes: dict[str, str] = {}
        self.count, self.place = count, batch_sharding(mesh)
        self.rows = own_rows(self.place, count)
        self.feed = feed
        self.batch = Prefetcher(self.make, steps)
        self.report, self.sources, self.fingerprint = feed.report(), feed.sources(), feed.fingerprint

    def prepare(self, model: Transformer, folder: Path, before: Callable[[str], None]) -> None:
        """Do what is needed before the first step.

        Args:
            model: the model that enters the stage.
            folder: the stage's folder, where results are cached.
            before: called with a description before each slow task; raises if the run should stop.
        """

    def resume(self, meta: Mapping[str, Any]) -> None:
        """Read what a checkpoint's meta names of later steps. Raises UserError if it is missing or damaged."""

    def work_ahead(self, step: int) -> None:
        """Prepare later steps while the devices compute the updates of this one."""

    def record(self, step: int, checkpoints: Checkpoints) -> dict[str, Any]:
        """What the meta of a checkpoint after `step` steps, which joins `checkpoints`, has of later steps."""
        return {}

    def make(self, step: int) -> TokenBatch:
        """This process's rows of a step's batch, in host memory."""
        return self.feed.batch(step, self.rows)

    def __call__(self, step: int, state: TrainState) -> tuple[Sequence[TokenBatch], dict[str, float]]:
        return [to_devices(self.batch(step), self.place, self.rows, self.count)], {}

    def show(self, log: MetricsLog, step: int) -> None:
        """Log samples of the latest batch for people to read (only batches that are sampled have any)."""

    def close(self) -> None:
        """Stop prefetching."""
        self.batch.close()


class CachedReferenceBatches(Batches):
    """Batches with reference log-probabilities, which are computed once for every example before training."""

    def __init__(self, stage: Stage, feed: Feed, count: int, mesh: Mesh):
        super().__init__(feed, count, mesh, stage.steps)
        self.stage = stage
        self.known: ReferenceLogps = {}

    def prepare(self, model: Transformer, folder: Path, before: Callable[[str], None]) -> None:
        self.known = precompute_reference_logps(self.feed, model, self.stage, self.place, folder / REFERENCE, before)

    def make(self, step: int) -> TokenBatch:
        rows = range(self.count) if self.rows is None else self.rows.tolist()
        return add_ref_logp(super().make(step), self.feed, step, rows, self.known)
