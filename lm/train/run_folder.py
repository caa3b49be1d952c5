"""The folder of a run: its layout, its lock, and the experiment that it belongs to.

runs/NAME/  experiment.json  environment.json  open_weights.json  tokenizer/  report.html  lock  sinks/
            stages/STAGE/    metrics.jsonl  eval.jsonl  samples.jsonl  summary.json  time.json  checkpoints/  tensorboard/  trajectories/  ahead/
                             benchmarks.jsonl
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.changes import EXPERIMENTS, Changes, changes, edited, normalised, read_experiment, stored_experiment
from lm.experiment import UserError
from lm.stored import make_folder, read_record, take_lock, write_json_atomic, write_sealed
from lm.train.run_shapes import ENVIRONMENT, SUMMARY

MOST_DIFFERENCES = 10
FINISHED = "finished"
"""Field of environment.json: names of the finished stages, so that the removal of a summary.json is noticed."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is created on disk before `lock` or `claim`."""

    path: Path

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def origin(self) -> Path:
        return self.path / "open_weights.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def stage_folder(self, name: str) -> Path:
        return self.path / "stages" / name

    def checkpoints(self, stage: str) -> Path:
        return self.stage_folder(stage) / "checkpoints"

    def summary(self, stage: str) -> Path:
        return self.stage_folder(stage) / "summary.json"

    def finished(self, stage: str) -> bool:
        """Whether the stage is finished: its summary.json, written last, exists."""
        return self.summary(stage).exists()

    def read_summary(self, stage: str) -> dict[str, Any]:
        """Read the summary.json of a finished stage. Raises UserError if the file is damaged."""
        found = read_record(self.summary(stage), SUMMARY)
        if "final_step" not in found and "steps" not in found:
            raise UserError(f"{self.summary(stage)} is damaged: it does not say at which step the stage ended")
        return found

    def final_step(self, stage: str) -> int | None:
        """The last step of a finished stage, None if it is unfinished. Raises UserError if its summary is damaged."""
        if not self.finished(stage):
            return None
        found = self.read_summary(stage)
        return found.get("final_step", found.get("steps"))

    def read_experiment(self) -> dict[str, Any]:
        """Read experiment.json as a plain value.

        Raises UserError if there is none.
        """
        return read_experiment(self.path)

    def read_environment(self) -> dict[str, Any]:
        """Read environment.json: `runs` (an entry per session) and the fingerprints at the start of the run; {} if missing.

        Raises:
            UserError: the file is damaged.
        """
        return read_record(self.environment, ENVIRONMENT) if self.environment.exists() else {}

    def record_finished(self) -> None:
        """Update the list of finished stages in environment.json."""
        known, now = self.read_environment(), self._finished()
        if known and known.get(FINISHED) != now:
            write_sealed(self.environment, known | {FINISHED: now})

    def has_begun(self) -> bool:
        """Whether a stage has files; until then the run depends on no earlier session."""
        return _has_files(self.path / "stages")

    def check_whole(self, stages: Iterable[str]) -> None:
        """Raise UserError if environment.json, or the summary of a stage that it lists as finished, was removed."""
        again = "put back a copy of it, or `lm run` rebuilds it"
        if not self.environment.exists() and self.has_begun():
            raise UserError(f"{self.environment} is gone: {again}")
        recorded = self.read_environment().get(FINISHED, [])
        for name in stages:
            if name in recorded and not self.finished(name):
                raise UserError(f"{self.summary(name)} is gone, and stage {name} was finished: {again}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this process. The lock ends with the process, also after SIGKILL.

        Raises UserError naming the process that holds the lock.
        """
        handle = self._take_lock()
        try:
            yield
        finally:
            os.close(handle)

    def claim(self, experiment: dict[str, Any], check: Callable[[Changes], None] = lambda changes: None) -> bool:
        """Claim the folder for `experiment` (a plain value); returns whether the run is a resumed one.

        A folder in which no stage has begun accepts any experiment, so that a corrected command can be run again.
        Changes that cannot affect trained stages are accepted and printed; `check` may refuse them.

        Raises:
            UserError: the folder belongs to another experiment; shows the differences.
        """
        experiment = json.loads(json.dumps(experiment))
        if not self.experiment.exists():
            self._refuse_foreign_files()
            make_folder(self.path, "--run-dir DIR")
            write_json_atomic(self.experiment, experiment)
            return False
        self._take_edited(experiment)
        there = normalised(self.read_experiment())
        begun = self._begun(there)
        found = changes(there, experiment, begun)
        if begun and found.refused:
            raise UserError(*self._refusal(found))
        if begun:
            check(found)
        else:
            shutil.rmtree(self.tokenizer, ignore_errors=True)  # the texts that it learns from may have changed
        if there != experiment:
            for name, _, _ in found.more_steps if begun else ():
                self.summary(name).unlink(missing_ok=True)
            if begun:
                self._print_changes(found)
            self._replace_experiment(there, experiment)
        return begun > 0 or there == experiment

    def sweep(self, stages: Iterable[str]) -> None:
        """Remove temporary files that a kill left. Call it inside `lock`.

        Stage folders that are links are skipped: they are shared with other runs, one of which may be writing.
        """
        folders = [self.stage_folder(name) for name in stages]
        for folder in [self.path, self.tokenizer, *(one for one in folders if not one.is_symlink())]:
            for draft in folder.glob("*.tmp"):
                if draft.is_file() and draft.name != f"{self.report.name}.tmp":  # which `lm report` may be writing
                    draft.unlink(missing_ok=True)

    def set_aside(self) -> Path | None:
        """Rename the folder to NAME.1 (or the first free number) and return its new path; None if there is no folder.

        Call it before `lock`. Raises UserError if another process uses the folder, or if it is not a run's folder.
        """
        if not self.path.exists():
            return None
        self._refuse_foreign_files()
        with self.lock():
            aside = next(p for n in itertools.count(1) if not (p := self._numbered(n)).exists())
            self.path.rename(aside)
        return aside

    def _take_edited(self, wanted: dict[str, Any]) -> None:
        """Accept an experiment.json that was edited by hand if it equals the requested experiment, and print the change."""
        if normalised(stored_experiment(self.path)) == wanted and (difference := edited(self.path, wanted)):
            print(f"{self.experiment} was changed, and the run goes on with it: {difference}", flush=True)
            write_sealed(self.environment, self.read_environment() | {EXPERIMENTS: [wanted]})

    def _replace_experiment(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Replace experiment.json; environment.json accepts both in between, so that a kill leaves a readable folder."""
        if known := self.read_environment():
            write_sealed(self.environment, known | {EXPERIMENTS: [old, new], FINISHED: self._finished()})
        write_json_atomic(self.experiment, new)

    def _finished(self) -> list[str]:
        return sorted(path.parent.name for path in self.path.glob("stages/*/summary.json"))

    def _begun(self, experiment: dict[str, Any]) -> int:
        """Number of stages up to the last one that has files; all stages if the files belong to none of them."""
        folders = [self.stage_folder(stage["name"]) for stage in experiment.get("stages", ())]
        begun = [place for place, folder in enumerate(folders, start=1) if _has_files(folder)]
        return max(begun, default=max(len(folders), 1) if _has_files(self.path / "stages") else 0)

    def _print_changes(self, found: Changes) -> None:
        for name, old, new in [*found.free, *((f"{name}.steps", old, new) for name, old, new in found.more_steps)]:
            print(f"{self.path} goes on with another {name}: {_shown(old)} → {_shown(new)}", flush=True)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _take_lock(self) -> int:
        file = self.path / "lock"
        while True:
            make_folder(self.path, "--run-dir DIR")
            handle = take_lock(file, "--run-dir DIR")
            if handle is None:
                holder = "another process"
                with contextlib.suppress(FileNotFoundError):  # the folder is being set aside
                    holder = file.read_text(errors="replace").strip() or holder
                raise UserError(
                    f"{self.path} is in use by {holder}: wait for it, stop it, or give this run its own folder (--run-dir DIR)"
                )
            if _is_open_file(handle, file):
                break
            os.close(handle)  # the folder was set aside between open and flock
        os.truncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return handle

    def _refuse_foreign_files(self) -> None:
        """Raise UserError if the folder has files but no experiment.json: it is not a run's folder."""
        if self.experiment.exists() or not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder (--run-dir DIR)")
        own = {"lock", "experiment.json.tmp"}
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in own and not p.name.startswith("."))
        if foreign:
            raise UserError(
                f"{self.path} has files ({foreign[0]}, …) but no experiment.json, so it is not a run's folder: "
                "name another one (--run-dir DIR)"
            )

    def _refusal(self, found: Changes) -> list[str]:
        differences = found.refused
        lines = [f"  {name}: {_shown(old)} → {_shown(new)}" for name, old, new in differences[:MOST_DIFFERENCES]]
        if len(differences) > MOST_DIFFERENCES:
            lines.append(f"  … and {len(differences) - MOST_DIFFERENCES} more")
        return [
            f"{self.path} belongs to a run of another experiment; what differs (there → now):",
            *lines,
            *found.reasons,
            "Two ways out: give this run its own folder (--run-dir DIR), or start it afresh "
            "(--fresh moves the old folder aside and loses nothing).",
        ]


def _has_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def _is_open_file(handle: int, file: Path) -> bool:
    return file.exists() and os.path.samestat(os.fstat(handle), file.stat())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
