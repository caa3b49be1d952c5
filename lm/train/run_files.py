"""Reads the files of a run folder into plain values, without jax."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.changes import read_experiment
from lm.config.field import shown
from lm.experiment import UserError, from_dict, to_dict
from lm.shapes import misfit
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder
from lm.train.run_shapes import SESSION, line_fault

Line = dict[str, Any]
BENCHMARK = ("task", "metric", "fewshot", "chat", "limit")
"""The fields that say what a line of benchmarks.jsonl measures."""
WHEN_ORDER = {"before": 0, "during": 1, "after": 2}


@dataclass(frozen=True)
class StageFiles:
    """The files of one stage, read: metrics, evals, samples, summary, the steps that have a checkpoint, warnings and benchmarks."""

    name: str
    kind: str
    steps: int
    metrics: list[Line]
    evals: list[Line]
    samples: list[Line]
    summary: Line | None
    checkpoints: tuple[int, ...]
    warnings: tuple[Line, ...] = ()
    benchmarks: tuple[Line, ...] = ()

    @property
    def steps_done(self) -> int:
        return self.steps if self.summary else max((int(line["step"]) for line in self.metrics), default=0)


@dataclass(frozen=True)
class Run:
    """A run folder, read: all stages in the experiment's order, begun or not, and one entry per session (start or resume)."""

    folder: Path
    experiment: dict[str, Any]
    sessions: list[dict[str, Any]]
    stages: tuple[StageFiles, ...]


def read_run(folder: Path) -> Run:
    """Read every file of a run folder that the report needs; the run may be unfinished or not begun.

    Raises:
        UserError: the folder is not a run's (names the missing file), a line is not JSON, or a file was removed.
    """
    if not os.path.isdir(folder):  # False for a name that is too long, where a Path raises
        raise UserError(f"there is no run folder {shown(str(folder))}")
    experiment = to_dict(from_dict(read_experiment(folder)))
    RunFolder(folder).check_whole(stage["name"] for stage in experiment["stages"])
    sessions = RunFolder(folder).read_environment().get("runs", [])
    stages = tuple(
        read_stage(folder, stage["name"], stage["objective"]["kind"], stage["steps"]) for stage in experiment["stages"]
    )
    return Run(folder, experiment, sessions, stages)


def check_sessions(run: Run) -> None:
    """Raise UserError if environment.json lacks something that the report tells of a session."""
    for place, session in enumerate(run.sessions):
        if fault := misfit(session, SESSION):
            file = RunFolder(run.folder).environment
            raise UserError(f"{file}: runs.{place} has no {fault:.80} that can be read; put back a copy of it")


def read_stage(run_dir: Path, name: str, kind: str, steps: int, texts: bool = True) -> StageFiles:
    """Read the files of one stage, begun or not; samples only if `texts`. Raises UserError if a line is not JSON."""
    folder = run_dir / "stages" / name
    summary = folder / "summary.json"
    return StageFiles(
        name=name,
        kind=kind,
        steps=steps,
        metrics=_last_of_each(_numbers(folder / "metrics.jsonl"), "step"),
        evals=_last_of_each(_numbers(folder / "eval.jsonl"), "step", "when", "eval"),
        samples=_last_of_each(
            _lines(folder / "samples.jsonl") if texts else [],
            "kind",
            "step",
            "when",
            "eval",
            "prompt",
            "chosen",
            "rejected",
        ),
        summary=RunFolder(run_dir).read_summary(name) if summary.is_file() else None,
        checkpoints=tuple(sorted(int(path.parent.name) for path in folder.glob("checkpoints/[0-9]*/manifest.json"))),
        warnings=tuple(_last_of_each(_lines(folder / "warnings.jsonl"), "text")),
        benchmarks=tuple(_last_of_each(_numbers(folder / "benchmarks.jsonl"), *BENCHMARK)),
    )


def _lines(path: Path) -> list[Line]:
    """Read the lines of a stage's file. Raises UserError if one has not the fields that pages and comparisons read."""
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if fault := line_fault(path.stem, line):
            raise UserError(
                f"{path}:{number} is not a line that was written here: its {fault:.80} cannot be read; remove that line"
            )
    return lines


def _numbers(path: Path) -> list[Line]:
    """Read lines of numbers; null (a number that was not finite) becomes nan."""
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in _lines(path)]


def _last_of_each(lines: list[Line], *names: str) -> list[Line]:
    """Sort lines by step and keep the last of those with equal values of `names`: a resumed run may repeat lines."""
    latest = {tuple(line.get(name) for name in names): line for line in lines}
    return sorted(latest.values(), key=step_order)


def finite(lines: Iterable[Line], *names: str) -> list[Line]:
    """The lines in which all of these numbers exist and are finite."""
    return [line for line in lines if all(math.isfinite(line.get(name, math.nan)) for name in names)]


def step_order(line: Line) -> tuple[int, int]:
    """Sort key of a line: its step, then before, during, after."""
    return int(line["step"]), WHEN_ORDER.get(line.get("when", "during"), 1)
