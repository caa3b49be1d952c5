"""What runs have measured, by name: `EVAL.FIELD` held out, `STAGE:FIELD` of the training itself."""

from __future__ import annotations

import math
from pathlib import Path

from lm.experiment import Experiment, UserError, nearest
from lm.train.run_files import Line, StageFiles, read_stage

LOWER_IS_BETTER = frozenset({"bits_per_byte", "loss"})
MAIN_FIELD = {"best_of_n": "reward"}  # of a metric whose main number has another name than it


def metric_name(experiment: Experiment, metric: str) -> tuple[str, str]:
    """(eval, field) of `EVAL`, `EVAL.FIELD` or "", the first eval; UserError where the experiment has no such eval."""
    names = {item.name: item.metric for item in experiment.evals}
    name, _, field = (metric or next(iter(names), "")).partition(".")
    if name not in names:
        raise UserError(f"metric {metric!r} names no eval of {experiment.name}{nearest(name, names)}")
    return name, field or MAIN_FIELD.get(names[name], names[name])


def better(field: str) -> int:
    """+1 where more of a field is better, -1 where less is."""
    return -1 if field in LOWER_IS_BETTER else 1


def final(stages: list[StageFiles], name: str, field: str) -> float:
    """A field of an eval after the last stage that measured it; nan where none did, or where it is no number."""
    lines = [line for stage in stages for line in stage.evals if line["eval"] == name and line["when"] == "after"]
    value = lines[-1].get(field) if lines else None
    return float(value) if isinstance(value, int | float) else math.nan


def measurements(stage: StageFiles, name: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of every measurement of an eval during and after a stage, in order."""
    lines: list[Line] = [line for line in stage.evals if line["eval"] == name and line["when"] != "before"]
    return [(int(line["step"]), float(line[field])) for line in lines if isinstance(line.get(field), int | float)]


def read_stages(run_dir: Path, experiment: Experiment) -> list[StageFiles]:
    """The files of every stage of a run."""
    return [read_stage(run_dir, stage.name, type(stage.objective).__name__, stage.steps) for stage in experiment.stages]
