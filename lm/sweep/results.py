"""Results of runs and sweeps: eval results (`EVAL.FIELD`) and training metrics, read from run folders."""

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
from lm.shapes import is_flag, is_number, is_text, misfit
from lm.stored import read_record
from lm.train.provenance import last_session
from lm.train.run_files import StageFiles, read_stage
from lm.train.run_folder import RunFolder

LOWER_IS_BETTER = frozenset({"bits_per_byte", "loss"})
DIVERGED = re.compile(r"\b(loss|grad_norm) is (nan|-?inf) at step")  # matches a run's error message
DESCRIPTION = "sweep.json"
TRIAL = {
    "settings": {"*": is_text},
    "seed": is_number,
    "wanted": is_flag,
    "failed?": is_text,
    "pruned?": is_flag,
    "impossible?": is_flag,
}
SWEEP = {"base": {}, "axes": {}, "search": {"kind": is_text}, "baseline?": {}}
EXPERIMENT = {
    "seed": is_number,
    "model": {"max_len": is_number},
    "evals": [{"name": is_text, "metric": is_text}],
    "stages": [{"name": is_text, "objective": {"kind": is_text}, "steps": is_number}],
}
"""What comparisons read of an experiment that this lm cannot read, as that of a trial that cannot run."""
MAIN_FIELD = {"best_of_n": "reward"}  # metrics whose main field has another name than the metric


def metric_name(experiment: Experiment, metric: str) -> tuple[str, str]:
    """Parse `EVAL`, `EVAL.FIELD` or "" (the first eval) to (eval, field). Raises UserError if there is no such eval."""
    names = {item.name: item.metric for item in experiment.evals}
    name, _, field = (metric or next(iter(names), "")).partition(".")
    if name not in names:
        raise UserError(f"metric {metric!r} names no eval of {experiment.name}{nearest(name, names)}")
    return name, field or main_field(names[name])


def main_field(metric: str) -> str:
    """Name of a metric's main field."""
    return MAIN_FIELD.get(metric, metric)


def better(field: str) -> int:
    """+1 if higher values of a field are better, -1 if lower values are."""
    return -1 if field in LOWER_IS_BETTER else 1


@dataclass(frozen=True)
class Result:
    """One run: its folder, experiment and results.

    Args:
        settings: values of the sweep's axes, as text; {} for a run outside a sweep.
        failed: reason why the trial failed; "" if it did not.
        pruned: whether the search ended the trial early.
        impossible: whether the trial cannot run; its experiment then has only the settings that could be applied.
    """

    folder: Path
    experiment: dict[str, Any]
    settings: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    pruned: bool = False
    impossible: bool = False

    @property
    def measured(self) -> bool:
        """Whether the run finished with a result."""
        return self.finished and not self.failed

    @property
    def seed(self) -> int:
        return int(self.experiment["seed"])

    @functools.cached_property
    def stages(self) -> dict[str, StageFiles]:
        """The files of every stage by name, without samples; read on first use."""
        return {
            stage["name"]: read_stage(
                self.folder, stage["name"], stage["objective"]["kind"], stage["steps"], texts=False
            )
            for stage in self.experiment["stages"]
        }

    @functools.cached_property
    def session(self) -> dict[str, Any]:
        """The last session's entry in environment.json: commit, versions, devices, data fingerprints; {} if there is none."""
        return last_session(self.folder)

    @property
    def diverged(self) -> bool:
        """Whether the run failed because its loss or gradient norm was not finite."""
        return DIVERGED.search(self.failed) is not None

    @property
    def finished(self) -> bool:
        last = self.experiment["stages"][-1]["name"]
        return (self.folder / "stages" / last / "summary.json").is_file()

    def final(self, name: str, field: str) -> float:
        """An eval's field after the last stage that measured it; nan if none did or it is not a number."""
        stages = self.stages.values()
        lines = [line for stage in stages for line in stage.evals if line["eval"] == name and line["when"] == "after"]
        value = lines[-1].get(field) if lines else None
        return float(value) if isinstance(value, int | float) else math.nan

    def best(self, name: str, field: str) -> float:
        """The best value of an eval's field over all measurements during and after stages; nan if there is none."""
        found = [value for stage in self.stages.values() for _, value in measurements(stage, name, field)]
        found = [value for value in found if math.isfinite(value)]
        return max(found, key=lambda value: better(field) * value, default=math.nan)

    def training(self, stage: str, field: str) -> list[tuple[int, float]]:
        """(step, value) of a field of a stage's training metrics, in order."""
        return [(int(line["step"]), float(line[field])) for line in self.stages[stage].metrics if field in line]


def measurements(stage: StageFiles, name: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of an eval's field at each measurement during and after a stage, in order."""
    lines = [line for line in stage.evals if line["eval"] == name and line["when"] != "before"]
    return [(int(line["step"]), float(line[field])) for line in lines if isinstance(line.get(field), int | float)]


def read_result(folder: Path) -> Result:
    """Read one run.

    Raises:
        UserError: the folder is not a run's, its experiment.json lacks a field, or a file of it was removed.
    """
    found = normalised(read_experiment(folder))
    if fault := misfit(found, EXPERIMENT):
        raise UserError(
            f"{folder / 'experiment.json'} is damaged: its {fault:.80} cannot be read; put back a copy of it"
        )
    RunFolder(folder).check_whole(stage["name"] for stage in found["stages"])
    return Result(folder, found)


def read_sweep(folder: Path) -> list[Result]:
    """Read all trials that a sweep wants, ordered by the values of its axes and by seed.

    Raises:
        UserError: the folder is not a sweep's, or a file in it is damaged.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} is not the folder of a sweep: it has no {DESCRIPTION}")
    found = []
    for file in sorted((folder / "trials").glob("*/trial.json")):
        known = read_trial(file)
        if known["wanted"]:
            extra = {name: known[name] for name in ("settings", "failed", "pruned", "impossible") if name in known}
            found.append(dataclasses.replace(read_result(file.parent), **extra))
    axes = read_description(folder)["axes"]
    return sorted(found, key=lambda result: ([_place(axes.get(n), v) for n, v in result.settings.items()], result.seed))


def read_description(folder: Path) -> dict[str, Any]:
    """Read sweep.json: base, axes and search. Raises UserError if it is damaged."""
    return read_record(folder / DESCRIPTION, SWEEP)


def read_trial(file: Path) -> dict[str, Any]:
    """Read a trial.json: settings, seed, whether it is wanted, how it ended. Raises UserError if it is damaged."""
    return read_record(file, TRIAL)


def _place(axis: Any, value: str) -> float:
    """Sort key of a value on its axis: its position among the axis's values, else the number itself; others come last."""
    if isinstance(axis, list) and value in axis:
        return float(axis.index(value))
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.inf
