"""Runs or resumes a sweep: claims its folder, queues its trials, and runs the workers."""

from __future__ import annotations

import signal
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
    """Run all trials that have not ended; returns a line for each trial that failed. A failure does not stop the others.

    Args:
        name: name or path of the file (FILE or FILE:NAME) that defines the sweep; each worker reads it.
        retry_failed: whether to run failed trials again.
        store: folder of the stages that trials share, also with other sweeps.
        cache: folder of the data cache for the workers; None: the default.

    Raises:
        UserError: the folder belongs to another sweep, the sweep is invalid, or every trial has failed.
        WorkerStopped: a signal arrived; running trials have saved.
    """
    if not isinstance(sweep.search, Suggested):
        trials(sweep)  # raises for an invalid sweep before anything is created on disk
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
        if study.open():  # the workers were stopped one by one
            raise WorkerStopped(signal.SIGTERM)
    else:
        Worker(sweep, place, study, "").work()
    failed = study.failures()
    if study.all_failed():
        raise UserError(f"every trial of sweep {sweep.name} failed ({len(failed)}); the first: {failed[0]}")
    return failed


def join(sweep: Sweep, folder: Path, store: Path, name: str) -> None:
    """Run as one of several workers until all trials have ended. Raises WorkerStopped after a signal."""
    place = SweepFolder(folder, store)
    Worker(sweep, place, Study(sweep, place), f"worker {name}: ").work()
