"""A sweep worker: takes trials one after another, runs each as `lm run` in a child process, and records its result.

A worker and its child may die at any moment: the trial's lock is then free, and the next worker resumes the trial from
its newest checkpoint. A stage that several trials share is trained, under a lock, by the first that reaches it, while
the others wait.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lm.data.cache import current_cache
from lm.experiment import Experiment, UserError
from lm.files import load
from lm.parent_death import with_parent
from lm.sweep.folder import SweepFolder, try_lock
from lm.sweep.results import measurements, metric_name, read_result
from lm.sweep.shared import pieces, stage_keys
from lm.sweep.study import ClaimedTrial, Study
from lm.sweep.sweep import Halving, Range, Suggested, Sweep
from lm.sweep.trials import error_text, settings_text, trial_at, trials
from lm.train.run_files import read_stage
from lm.train.run_folder import RunFolder

POLL_SECONDS = 1.0
MOST_DEATHS = 3  # consecutive deaths of a trial's process without a new checkpoint before it fails
EXIT_USER = 2


class WorkerStopped(Exception):
    """Raised with the number of the signal that stopped a worker; its trial has saved, and the next worker resumes it."""

    @property
    def exit_code(self) -> int:
        return 128 + self.args[0]


@dataclass
class Worker:
    """One process that runs trials of a sweep, one at a time."""

    sweep: Sweep
    folder: SweepFolder
    study: Study
    name: str
    stopping: int = 0  # the signal that arrived
    held: list[int] = field(default_factory=list)  # file descriptors of locks that child processes inherit

    def work(self) -> None:
        """Run trials until all of the sweep have ended, in this or other workers.

        Raises:
            WorkerStopped: a signal arrived.
        """
        all_keys = _known_keys(self.sweep)
        with self._signals():
            while True:
                if self.stopping:
                    raise WorkerStopped(self.stopping)
                claimed = self.study.take()
                while self.study.refused:
                    self.say(f"cannot run: {self.study.refused.pop(0)}")
                if claimed is None:
                    if not self.study.open():
                        return
                    time.sleep(POLL_SECONDS)
                    continue
                with self._holding(claimed.handle):
                    self._trial(claimed, all_keys)

    def _trial(self, claimed: ClaimedTrial, all_keys: list[list[str]]) -> None:
        """Run a trial, record its end and print it. An error in running or reading it fails only this trial."""
        began = time.monotonic()
        value, failed, pruned = math.nan, "", False
        try:
            value, failed, pruned = self._outcome(claimed, all_keys)
        except UserError as error:
            failed = error_text(error)
        self.study.tell(claimed, value if math.isfinite(value) else 0.0, failed, pruned)
        done, of = self.study.counts()
        how = failed or ("ended early, since others were better" if pruned else "")
        metric = self.sweep.metric or next((item.name for item in self.sweep.base.evals), "the first eval")
        result = how or (f"{metric} {value:.4g}" if math.isfinite(value) else "done")
        self.say(f"[{done}/{of}] {settings_text(claimed.settings)}, seed {claimed.seed}: {result}, {_clock(began)}")

    def _outcome(self, claimed: ClaimedTrial, all_keys: list[list[str]]) -> tuple[float, str, bool]:
        """Run a trial; returns (value of the metric, reason of failure or "", whether the search ended it early)."""
        run_dir = self.folder.trial(claimed.key)
        experiment = load(str(run_dir / "experiment.json"))
        keys = stage_keys(experiment)
        failed, pruned = "", False
        for piece in pieces(keys, all_keys if keys in all_keys else [*all_keys, keys]):
            with self._stages(keys, piece, len(keys) - 1):
                failed, pruned = self._piece(claimed, experiment, run_dir, piece)
            if failed or pruned:
                break
        value = math.nan
        if not failed and not pruned and experiment.evals:
            name, field = metric_name(experiment, self.sweep.metric)
            value = read_result(run_dir).final(name, field)
            if not math.isfinite(value):
                failed = f"{name}.{field} after the last stage is not a finite number"
        return value, failed, pruned

    def _piece(self, claimed: ClaimedTrial, experiment: Experiment, run_dir: Path, piece: range) -> tuple[str, bool]:
        """Train consecutive stages of a trial; returns (reason of failure or "", whether the search ended it early)."""
        names = [experiment.stages[i].name for i in piece]
        deaths, saved = 0, set[Path]()
        while not all(RunFolder(run_dir).finished(name) for name in names):
            code, pruned = self._process(claimed, experiment, run_dir, names[-1])
            if pruned:
                return "", True
            if self.stopping:
                raise WorkerStopped(self.stopping)
            if code == EXIT_USER:
                return reason(run_dir / "log.txt"), False
            if all(RunFolder(run_dir).finished(name) for name in names):
                break
            now = set(run_dir.glob("stages/*/checkpoints/*/manifest.json"))
            deaths, saved = (1 if now - saved else deaths + 1), now
            if deaths >= MOST_DEATHS:
                return f"its process died {deaths} times with exit code {code}: {reason(run_dir / 'log.txt')}", False
            self.say(f"{settings_text(claimed.settings)}, seed {claimed.seed}: died with exit code {code}; resuming")
        return "", False

    def _process(self, claimed: ClaimedTrial, experiment: Experiment, run_dir: Path, until: str) -> tuple[int, bool]:
        """Run `lm run` in a child process until stage `until`; returns (exit code, whether the search ended it early)."""
        pruned = False
        command = [sys.executable, "-m", "lm.cli.main", "run", str(run_dir / "experiment.json")]
        words = [*command, "--run-dir", str(run_dir), "--until", until, "--cache", str(current_cache().folder)]
        words.append("--no-report")
        with (run_dir / "log.txt").open("ab") as log:
            # The child ends when its worker is killed, and holds the inherited locks until then.
            child = subprocess.Popen(
                with_parent(words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(current_cache().folder),
                pass_fds=self.held,
                start_new_session=True,
            )
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
                if self.stopping:
                    child.send_signal(signal.SIGTERM)
                    child.wait()
                if not pruned and until == experiment.stages[-1].name and self._is_pruned(claimed, experiment, run_dir):
                    pruned = True
                    child.send_signal(signal.SIGTERM)
        return child.returncode, pruned

    def _is_pruned(self, claimed: ClaimedTrial, experiment: Experiment, run_dir: Path) -> bool:
        """Whether successive halving ends the trial; reports its values at the measured steps to the study."""
        if not isinstance(self.sweep.search, Halving):
            return False
        name, field = metric_name(experiment, self.sweep.metric)
        last = experiment.stages[-1]
        measured = measurements(read_stage(run_dir, last.name, "", last.steps), name, field)
        numbers = [(step, value) for step, value in measured if step < last.steps and math.isfinite(value)]
        told = [self.study.report(claimed, step, value) for step, value in numbers]
        return any(told)

    @contextlib.contextmanager
    def _stages(self, keys: list[str], piece: range, last: int) -> Iterator[None]:
        """Context that holds the locks of shared stages (a trial's last stage is never shared)."""
        with contextlib.ExitStack() as inside:
            for index in piece:
                if index != last:
                    inside.enter_context(self._holding(self._wait_for(keys[index])))
            yield

    def _wait_for(self, key: str) -> int:
        """Wait for the lock of a shared stage and return its file descriptor."""
        shared = self.folder.shared(key)
        while (handle := try_lock(shared.with_name(f"{shared.name}.lock"))) is None:
            if self.stopping:
                raise WorkerStopped(self.stopping)
            time.sleep(POLL_SECONDS)
        return handle

    @contextlib.contextmanager
    def _holding(self, handle: int) -> Iterator[None]:
        self.held.append(handle)
        try:
            yield
        finally:
            self.held.remove(handle)
            os.close(handle)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, _: object) -> None:
            self.stopping = number

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def say(self, text: str) -> None:
        print(f"{self.name}{text}", flush=True)


def environment(cache: Path) -> dict[str, str]:
    """Environment variables of a trial's process, with a compilation cache shared by trials unless one is set."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return own | os.environ


def reason(log: Path) -> str:
    """The reason why a run ended: its last error message in the log, else its last line."""
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("lm: error:")]
    return (told or lines or ["it printed nothing"])[-1].removeprefix("lm: error: ")


def _known_keys(sweep: Sweep) -> list[list[str]]:
    """Stage keys of every trial of a grid; of a search, of trials at the ends of its axes, which show what is shared."""
    if not isinstance(sweep.search, Suggested):
        return [stage_keys(trial.experiment) for trial in trials(sweep) if not trial.impossible]
    low = {name: values.low if isinstance(values, Range) else 0 for name, values in sweep.axes.items()}
    found = []
    for name, values in sweep.axes.items():
        ends = (values.low, values.high) if isinstance(values, Range) else range(len(values))
        for seed in sweep.seeds:
            found += [trial_at(sweep, low | {name: end}, seed) for end in ends]
    return [stage_keys(trial.experiment) for trial in found if trial is not None and not trial.impossible]


def _clock(began: float) -> str:
    seconds = time.monotonic() - began
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
