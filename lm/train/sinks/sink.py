"""What a sink is, and the values that all of them are sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lm.experiment import Experiment, flatten, to_dict

PROJECT = "lm"
"""The project, or MLflow's experiment, of runs where the environment names no other."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of one line of a stage's files: `kind` is the file's name without its ending, `values` by name.

    `total` is the step counted over all stages.
    """

    stage: str
    kind: str
    step: int
    total: int
    values: Mapping[str, float]

    @property
    def named(self) -> dict[str, float]:
        """The values under the names that wandb, trackio and MLflow show: STAGE/NAME."""
        return {f"{self.stage}/{name}": value for name, value in self.values.items()}


@dataclass(frozen=True)
class Target:
    """The run to show: its folder, its experiment, and the sink's own id of it from an earlier session, if there was one."""

    folder: Path
    experiment: Experiment
    known: str

    @property
    def config(self) -> dict[str, Any]:
        """Every field of the experiment by its dotted name, without passwords and keys in URLs."""
        return {name: without_secrets(value) for name, value in flatten(to_dict(self.experiment)).items()}


class Sink(Protocol):
    """An opened sink. Any method may raise anything: the sink is then dropped."""

    run: str  # the sink's own id of the run, with which a later session goes on
    where: str  # where to look at it

    def send(self, lines: Sequence[Numbers]) -> None: ...

    def flush(self) -> None:
        """Return when everything sent would survive the end of this process."""

    def close(self) -> None: ...


Opener = Callable[[Target], Sink]


def numbers_of(stage: str, kind: str, line: Mapping[str, Any], before: int) -> Numbers:
    """The numbers of a line as it is in the file; `before` is the number of steps of the stages before this one."""
    prefix = {"eval": f"eval/{line.get('eval')}/", "benchmarks": f"benchmark/{line.get('task')}/"}.get(kind, "")
    values = {name: value for name, value in line.items() if name != "step" and _is_number(value)}
    if kind == "benchmarks":
        values = {str(line.get("metric")): line["value"]} if _is_number(line.get("value")) else {}
    return Numbers(
        stage, kind, line["step"], before + line["step"], {f"{prefix}{name}": one for name, one in values.items()}
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_secrets(value: Any) -> Any:
    """The value without the users, passwords and queries of the URLs in it."""
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\w+://)(?:[^/\s@]*@)?([^\s?#]*)(?:[?#]\S*)?", r"\1\2", value)
