"""Differences between two experiments, and which of them a resumed run may have."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config.former import former_name, former_value
from lm.experiment import OBJECTIVES, Experiment, Stage, UserError, diff, from_dict, to_dict
from lm.shapes import is_count, is_text, misfit
from lm.stored import read_json, read_record

Plain = dict[str, Any]
COLLECTING = {name for name, kind in OBJECTIVES.items() if kind.produces == "rows"}
Difference = tuple[str, Any, Any]  # dotted name, old value, new value


def normalised(experiment: Plain) -> Plain:
    """The plain value of an experiment with every field that it lacks at its default, as an older lm may have written it.

    A value that this lm cannot read stays as it is.
    """
    try:
        return json.loads(json.dumps(to_dict(from_dict(experiment))))
    except UserError:
        return experiment


def without_defaults(experiment: Experiment) -> Plain:
    """The plain value of an experiment without the fields at their defaults, under first names: the same in every version of lm."""
    return _without_defaults(experiment)


def _without_defaults(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_defaults(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    kept = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    plain = {former_name(name): former_value(name, _without_defaults(item)) for name, item in kept.items()}
    return {"kind": type(value).__name__, **plain}


EXPERIMENTS = "experiments"
"""Field of environment.json with the run's experiment; with the one before it too while experiment.json is replaced."""


def stored_experiment(folder: Path) -> Plain:
    """The plain value in experiment.json of a run folder, as stored.

    Raises:
        UserError: the file is missing, or is not the value of an experiment.
    """
    file = folder / "experiment.json"
    if not file.exists():
        raise UserError(f"{folder} is not the folder of a run: it has no experiment.json")
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    stages = found.get("stages")
    if not isinstance(stages, list) or not stages or not all(map(_is_stage, stages)):
        raise UserError(f"{file} is damaged: it has no list of stages, each with its name and its objective")
    return found


def read_experiment(folder: Path) -> Plain:
    """The plain value in experiment.json of a run folder, checked against environment.json.

    Raises:
        UserError: one of the two files is missing or damaged; names the field.
    """
    found = stored_experiment(folder)
    if difference := edited(folder, found):
        raise UserError(
            f"{folder / 'experiment.json'} is damaged: {difference}: put back a copy of it (if you changed it, "
            f"`lm run {folder / 'experiment.json'} --run-dir {folder}` goes on with it)"
        )
    return found


def edited(folder: Path, experiment: Plain) -> str:
    """What differs between an experiment and the one that environment.json of the run's folder names; "" where nothing does."""
    environment = folder / "environment.json"
    recorded = read_record(environment, {f"{EXPERIMENTS}?": [{}]}).get(EXPERIMENTS, []) if environment.exists() else []
    if not recorded or any(normalised(experiment) == normalised(one) for one in recorded):
        return ""
    different = [
        f"{name:.200} is {json.dumps(now):.80}, and {environment.name} beside it says {json.dumps(was):.80}"
        for name, was, now in diff(normalised(recorded[-1]), normalised(experiment))
    ]
    return (different or ["it has other fields"])[0]


def _is_stage(value: Any) -> bool:
    """Whether a plain value has what tells of a stage's files: a name that is one of a folder, and the kind of objective."""
    if not isinstance(value, dict) or not isinstance(value.get("objective"), dict):
        return False
    name, kind = value.get("name"), value["objective"].get("kind")
    return isinstance(name, str) and Path(name).name == name and "\0" not in name and isinstance(kind, str)


COMPARED = {
    "tokenizer?": {},
    "stages": [{"name": is_text, "objective": {"kind": is_text}, "steps?": is_count, "optimizer?": {}}],
}
"""What `changes` reads of two experiments. Of one that lacks it, as an older lm or a hand may have written it, all counts as different."""


@dataclass(frozen=True)
class Changes:
    """Differences between an experiment and the one that a run began with.

    `free` cannot change what has been trained; `more_steps` are (stage, old, new) of stages whose schedule allows them;
    `refused` is the rest, and `reasons` say more of some of it.
    """

    free: tuple[Difference, ...] = ()
    more_steps: tuple[tuple[str, int, int], ...] = ()
    refused: tuple[Difference, ...] = ()
    reasons: tuple[str, ...] = ()


def changes(old: Plain, new: Plain, begun: int) -> Changes:
    """Differences between the plain values `old` and `new`, both normalised.

    Args:
        begun: how many stages of the run have files: the settings of a later one, its sources aside, may change.
    """
    if any(misfit(one, COMPARED) for one in (old, new)):
        return Changes(refused=tuple(diff(old, new)))
    before, after = _trained_part(old, begun), _trained_part(new, begun)
    if old.get("tokenizer", {}).get("path") is not None:  # else the vocabulary is learnt from the text of all stages
        after["stages"] = after["stages"][: max(begun, len(before["stages"]))]
        before["stages"] = before["stages"][: max(begun, len(after["stages"]))]
    more, reasons = [], []
    for ours, theirs in zip(before["stages"], after["stages"], strict=False):
        if (
            not {"steps"} <= ours.keys() & theirs.keys()
            or ours["steps"] == theirs["steps"]
            or ours["name"] != theirs["name"]
        ):
            continue
        if reason := _why_not(ours, theirs):
            reasons.append(reason)
        else:
            more.append((ours["name"], ours["steps"], theirs["steps"]))
            theirs["steps"] = ours["steps"]
    refused = tuple(diff(before, after))
    told = {name for name, _, _ in refused} | {f"{name}.steps" for name, _, _ in more}
    return Changes(tuple(one for one in diff(old, new) if one[0] not in told), tuple(more), refused, tuple(reasons))


def _why_not(old: Plain, new: Plain) -> str:
    """Why a stage that has begun cannot go on to another number of steps; "" where it can."""
    name, schedule = old["name"], old.get("optimizer", {}).get("schedule")
    if new["steps"] < old["steps"]:
        return f"the steps of {name} can only become more."
    if schedule == "constant" or old.get("objective", {}).get("kind") in COLLECTING:
        return ""
    return (
        f"The learning rate of {name} ({schedule}) falls over all of its steps: with more of them the past ones would have "
        f"been others. To keep the stages before it: copy the folder, remove stages/{name} and those after it from the copy, "
        "and give the copy as --run-dir."
    )


def _trained_part(experiment: Plain, begun: int) -> Plain:
    """The fields that can change what has been trained; of a stage that has not begun its name and its sources."""
    stages = [
        _affecting(Stage, stage) if place < begun else {name: stage.get(name) for name in ("name", "sources")}
        for place, stage in enumerate(experiment["stages"])
    ]
    return _affecting(Experiment, experiment) | {"stages": stages}


def _affecting(kind: type, value: Plain) -> Plain:
    free = {f.name for f in dataclasses.fields(kind) if not f.metadata.get("affects_training", True)}
    return {name: item for name, item in value.items() if name not in free}
