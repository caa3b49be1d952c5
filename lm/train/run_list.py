"""Lists runs with their state and size, and removes runs or their older checkpoints, without jax."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.changes import read_experiment
from lm.experiment import UserError
from lm.json_lines import read_last_line
from lm.stored import is_locked
from lm.train.metrics import SHOWN
from lm.train.run_folder import RunFolder

PARTS = {"experiment.json", "environment.json", "stages"}
"""Parts of a run. A folder with two of them is a run, which may have lost the third."""


@dataclass(frozen=True)
class RunState:
    """A run: its state in words, its last metrics, its size and that of its checkpoints in bytes, and when it was last written (s)."""

    folder: Path
    state: str
    metrics: str
    size: int
    checkpoints: int
    written: float


def list_runs(folder: Path) -> list[RunState]:
    """The runs in a folder, at any depth below it but not within a run; the one written last comes first.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name one that has runs")
    return sorted(map(run_state, _run_folders(folder)), key=lambda one: -one.written)


def _run_folders(folder: Path) -> Iterable[Path]:
    for here, below, files in os.walk(folder):
        if len(PARTS.intersection(files + below)) > 1:
            below.clear()
            yield Path(here)


def run_state(folder: Path) -> RunState:
    """The state of one run; what cannot be read is said in its place."""
    sizes = {path: path.lstat() for path in folder.rglob("*") if path.is_file()}
    saved = sum(found.st_size for path, found in sizes.items() if "checkpoints" in path.parts)
    written = max((found.st_mtime for found in sizes.values()), default=folder.stat().st_mtime)
    try:
        names = [(stage["name"], int(stage.get("steps", 0))) for stage in read_experiment(folder)["stages"]]
        RunFolder(folder).check_whole(name for name, _ in names)
        state, metrics = _progress(RunFolder(folder), names)
    except (UserError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        state, metrics = "cannot be read", " ".join(str(error).replace(f"{folder}/", "").split())[:60]
    if is_running(folder):
        state = f"running: {state}"
    return RunState(folder, state, metrics, sum(found.st_size for found in sizes.values()), saved, written)


def is_running(folder: Path) -> bool:
    """Whether a process has the run's lock."""
    return is_locked(folder / "lock")


def _progress(run: RunFolder, stages: list[tuple[str, int]]) -> tuple[str, str]:
    """Where a run is, and the last metrics of its last stage that has any."""
    begun = [
        (name, steps, last) for name, steps in stages if (last := _last_line(run.stage_folder(name) / "metrics.jsonl"))
    ]
    metrics = (
        ", ".join(f"{key} {begun[-1][2][key]:.4g}" for key in SHOWN if _is_number(begun[-1][2].get(key)))
        if begun
        else ""
    )
    left = [(name, steps) for name, steps in stages if not run.finished(name)]
    if not left:
        return "finished", metrics
    name, steps = left[0]
    done = next((last.get("step", 0) for known, _, last in begun if known == name), 0)
    return f"{name} {done:,} of {steps:,}", metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _last_line(path: Path) -> dict[str, Any]:
    """The last object of a JSON-lines file, {} without one."""
    found = json.loads(read_last_line(path) or "{}")
    return found if isinstance(found, dict) else {}


def older_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that neither a resume nor a later stage reads: in each stage all but the newest two intact ones.

    Of a finished stage all but the last, which its summary names.
    """
    found = []
    for stage in sorted((folder / "stages").glob("*")):
        steps = sorted(path for path in (stage / "checkpoints").glob("[0-9]*") if (path / "manifest.json").is_file())
        keep = 1 if RunFolder(folder).finished(stage.name) else 2
        found += steps[:-keep]
    return found


def readers_of(folder: Path, others: Iterable[Path]) -> list[Path]:
    """The other runs whose experiments name this run, as RUN:STAGE."""
    names = {json.dumps(f"{name}:")[:-1] for name in (folder.name, str(folder), str(folder.resolve()))}

    def text(other: Path) -> str:  # environment.json repeats what experiment.json says, which may be gone
        files = (RunFolder(other).experiment, RunFolder(other).environment)
        return "".join(file.read_text(errors="replace") for file in files if file.is_file())

    return [
        other for other in others if other.resolve() != folder.resolve() and any(name in text(other) for name in names)
    ]


def remove(folder: Path, paths: Iterable[Path]) -> None:
    """Remove folders of a run, or the run itself, while its lock is held; a kill leaves only whole ones or hidden rests.

    Raises:
        UserError: a process has the run's lock.
    """
    with RunFolder(folder).lock():
        for path in paths:
            hidden = path.with_name(f".{path.name}.removed-{time.time_ns()}")
            path.rename(hidden)
            shutil.rmtree(hidden)
