"""The files of a run folder, read into plain values."""

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
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder, read_sealed

Line = dict[str, Any]
WHEN = {"before": 0, "during": 1, "after": 2}


@dataclass(frozen=True)
class StageFiles:
    """One stage of a run: what it should do, what it has written so far, and the steps of which a checkpoint is there.

    `warnings` are lines of a step and a text, each written once in a run.
    """

    name: str
    kind: str
    steps: int
    metrics: list[Line]
    evals: list[Line]
    samples: list[Line]
    summary: Line | None
    checkpoints: tuple[int, ...]
    warnings: tuple[Line, ...] = ()

    @property
    def steps_done(self) -> int:
        return self.steps if self.summary else max((int(line["step"]) for line in self.metrics), default=0)


@dataclass(frozen=True)
class Run:
    """A run folder, read. Stages stand in the order of the experiment, begun or not; sessions began or resumed it."""

    folder: Path
    experiment: dict[str, Any]
    sessions: list[dict[str, Any]]
    stages: tuple[StageFiles, ...]


def read_run(folder: Path) -> Run:
    """Every file of a run folder that the report needs; a run may be unfinished or not even begun.

    Raises:
        UserError: the folder is no run (says which file is missing), a line of a file is not JSON, or a file is gone.
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


def read_stage(run_dir: Path, name: str, kind: str, steps: int, texts: bool = True) -> StageFiles:
    """The files of one stage of a run, begun or not; `texts`: also the samples. Raises UserError where a line is not JSON."""
    folder = run_dir / "stages" / name
    summary = folder / "summary.json"
    return StageFiles(
        name=name,
        kind=kind,
        steps=steps,
        metrics=_last_of_each(_numbers(folder / "metrics.jsonl"), "step"),
        evals=_last_of_each(_numbers(folder / "eval.jsonl"), "step", "when", "eval"),
        samples=_last_of_each(
            read_lines(folder / "samples.jsonl") if texts else [],
            "kind",
            "step",
            "when",
            "eval",
            "prompt",
            "chosen",
            "rejected",
        ),
        summary=read_sealed(summary) if summary.is_file() else None,
        checkpoints=tuple(sorted(int(path.parent.name) for path in folder.glob("checkpoints/[0-9]*/manifest.json"))),
        warnings=tuple(_last_of_each(read_lines(folder / "warnings.jsonl"), "text")),
    )


def _numbers(path: Path) -> list[Line]:
    """Lines of measurements, in which null stands for what was not finite."""
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in read_lines(path)]


def _last_of_each(lines: list[Line], *names: str) -> list[Line]:
    """Lines in order of step, the last one of those that agree in `names`: a resumed run repeats itself."""
    latest = {tuple(line.get(name) for name in names): line for line in lines}
    return sorted(latest.values(), key=place)


def finite(lines: Iterable[Line], *names: str) -> list[Line]:
    """The lines in which all these numbers are there and finite."""
    return [line for line in lines if all(math.isfinite(line.get(name, math.nan)) for name in names)]


def place(line: Line) -> tuple[int, int]:
    """What lines are ordered by: the step, and at one step before, during, after."""
    return int(line["step"]), WHEN.get(line.get("when", "during"), 1)
