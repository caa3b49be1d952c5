"""A sweep from its beginning, or from where it was: the folder, the queue, the workers."""

from __future__ import annotations

from pathlib import Path

from lm.experiment import UserError
from lm.sweep.folder import SweepFolder
from lm.sweep.pool import pool
from lm.sweep.study import Study
from lm.sweep.sweep import STORE, Suggested, Sweep
from lm.sweep.trials import trials
from lm.sweep.worker import Worker, WorkerStopped


def run_sweep(
    sweep: Sweep,
    name: str,
    folder: Path,
    workers: int = 1,
    retry_failed: bool = False,
    cache: Path | None = None,
    store: Path = STORE,
) -> list[str]:
    """Run every trial that is not done; gives a line for each that failed, and the rest goes on.

    Args:
        name: of the file (and value) that defines the sweep, which several workers read for themselves.
        store: folder of the stages that trials share, also with other sweeps.
        cache: folder of tokenised data, for the workers; None: where it is by default.

    Raises:
        UserError: the folder belongs to another sweep, the sweep cannot work, or every trial has failed.
        WorkerStopped: a signal came; what ran has saved.
    """
    if not isinstance(sweep.search, Suggested):
        trials(sweep)  # what cannot work says so before anything is made on disk
    place = SweepFolder(folder, store)
    place.claim(sweep)
    study = Study(sweep, place)
    study.queue(retry_failed)
    if study.remark:
        print(f"lm sweep: {study.remark}", flush=True)
    done, known = study.counts()
    failed = study.failures()
    some = f", {len(failed)} of these failed (--retry-failed runs them again)" if failed else ""
    print(f"{folder}: {known} trials, {done} of them done{some}", flush=True)
    if workers > 1:
        extra = [] if cache is None else ["--cache", str(cache)]
        pool(["sweep", name, "--folder", str(folder), "--store", str(store), *extra], workers)
        if study.open():  # the workers were asked to end one by one
            raise WorkerStopped
    else:
        Worker(sweep, place, study, "").work()
    failed = study.failures()
    if study.all_failed():
        raise UserError(f"every trial of sweep {sweep.name} failed ({len(failed)}); the first: {failed[0]}")
    return failed


def join(sweep: Sweep, folder: Path, store: Path, name: str) -> None:
    """Be one of several workers, until all trials have ended. Raises WorkerStopped when a signal came."""
    place = SweepFolder(folder, store)
    Worker(sweep, place, Study(sweep, place), f"worker {name}: ").work()
