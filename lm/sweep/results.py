"""What runs have measured: `EVAL.FIELD` held out, and the fields of the training's own lines, of one run or of many."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.changes import normalised, read_experiment
from lm.experiment import Experiment, UserError, nearest
from lm.stored import read_record
from lm.train.provenance import last_session
from lm.train.run_files import StageFiles, read_stage

LOWER_IS_BETTER = frozenset({"bits_per_byte", "loss"})
DIVERGED = re.compile(r"\b(loss|grad_norm) is (nan|-?inf) at step")  # as a run says it
DESCRIPTION = "sweep.json"
ENDED = {"failed": str, "pruned": bool, "impossible": bool}  # how a trial ended, in its trial.json
MAIN_FIELD = {"best_of_n": "reward"}  # of a metric whose main number has another name than it


def metric_name(experiment: Experiment, metric: str) -> tuple[str, str]:
    """(eval, field) of `EVAL`, `EVAL.FIELD` or "", the first eval; UserError where the experiment has no such eval."""
    names = {item.name: item.metric for item in experiment.evals}
    name, _, field = (metric or next(iter(names), "")).partition(".")
    if name not in names:
        raise UserError(f"metric {metric!r} names no eval of {experiment.name}{nearest(name, names)}")
    return name, field or main_field(names[name])


def main_field(metric: str) -> str:
    """The field that is the number of a metric."""
    return MAIN_FIELD.get(metric, metric)


def better(field: str) -> int:
    """+1 where more of a field is better, -1 where less is."""
    return -1 if field in LOWER_IS_BETTER else 1


@dataclass(frozen=True)
class Result:
    """One run: what it was, and what it has measured. `settings` are a sweep's axes, as they are shown.

    Of an `impossible` trial the experiment is as far as the settings could be applied.
    """

    folder: Path
    experiment: dict[str, Any]
    settings: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    pruned: bool = False
    impossible: bool = False

    @property
    def measured(self) -> bool:
        """Whether it has something to say at its end."""
        return self.finished and not self.failed

    @property
    def seed(self) -> int:
        return int(self.experiment["seed"])

    @functools.cached_property
    def stages(self) -> dict[str, StageFiles]:
        """The files of every stage, by its name; read when they are first asked for, without the samples."""
        return {
            stage["name"]: read_stage(
                self.folder, stage["name"], stage["objective"]["kind"], stage["steps"], texts=False
            )
            for stage in self.experiment["stages"]
        }

    @functools.cached_property
    def session(self) -> dict[str, Any]:
        """What its last session wrote down of itself: commit, versions, devices, fingerprints of its data; {} before it."""
        return last_session(self.folder)

    @property
    def diverged(self) -> bool:
        """Whether it failed because its loss or its gradient was no number."""
        return DIVERGED.search(self.failed) is not None

    @property
    def finished(self) -> bool:
        last = self.experiment["stages"][-1]["name"]
        return (self.folder / "stages" / last / "summary.json").is_file()

    def final(self, name: str, field: str) -> float:
        """A field of an eval after the last stage that measured it; nan where none did, or where it is no number."""
        stages = self.stages.values()
        lines = [line for stage in stages for line in stage.evals if line["eval"] == name and line["when"] == "after"]
        value = lines[-1].get(field) if lines else None
        return float(value) if isinstance(value, int | float) else math.nan

    def best(self, name: str, field: str) -> float:
        """The best of a field of an eval during and after the stages that measured it; nan where none did."""
        found = [value for stage in self.stages.values() for _, value in measurements(stage, name, field)]
        found = [value for value in found if math.isfinite(value)]
        return max(found, key=lambda value: better(field) * value, default=math.nan)

    def training(self, stage: str, field: str) -> list[tuple[int, float]]:
        """(step, value) of a field of the training's own lines, in order."""
        return [(int(line["step"]), float(line[field])) for line in self.stages[stage].metrics if field in line]


def measurements(stage: StageFiles, name: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of every measurement of an eval during and after a stage, in order."""
    lines = [line for line in stage.evals if line["eval"] == name and line["when"] != "before"]
    return [(int(line["step"]), float(line[field])) for line in lines if isinstance(line.get(field), int | float)]


def read_result(folder: Path) -> Result:
    """One run. Raises UserError where the folder is none."""
    return Result(folder, normalised(read_experiment(folder)))


def read_sweep(folder: Path) -> list[Result]:
    """Every trial of a sweep that the sweep still asks for, in the order of its axes' values and its seeds.

    Raises:
        UserError: the folder is no sweep's, or a file of it is damaged.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} is not the folder of a sweep: it has no {DESCRIPTION}")
    found = []
    for file in sorted((folder / "trials").glob("*/trial.json")):
        known = read_trial(file)
        if known["wanted"]:
            extra = {name: known[name] for name in ("settings", *ENDED) if name in known}
            found.append(dataclasses.replace(read_result(file.parent), **extra))
    axes = read_description(folder)["axes"]
    return sorted(found, key=lambda result: ([_place(axes.get(n), v) for n, v in result.settings.items()], result.seed))


def read_description(folder: Path) -> dict[str, Any]:
    """What a sweep's folder says of it: its base, axes and search. Raises UserError where the file is damaged."""
    return read_record(folder / DESCRIPTION, {"base": dict, "axes": dict, "search": dict})


def read_trial(file: Path) -> dict[str, Any]:
    """What a trial.json says: settings, seed, whether it is wanted, how it ended. Raises UserError where it is damaged."""
    return read_record(file, {"settings": dict, "seed": int, "wanted": bool}, ENDED)


def _place(axis: Any, value: str) -> float:
    """Where a value stands on its axis: its place among the values, or itself; what is neither comes last."""
    if isinstance(axis, list) and value in axis:
        return float(axis.index(value))
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.inf
