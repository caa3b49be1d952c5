"""Warnings of a stage, each shown once: signs in its metrics that it learns nothing, and notes of its batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.config.objective import WARNING_STEPS, MetricWarning
from lm.experiment import Experiment, Stage
from lm.train.metrics import MetricsLog, read_lines

Line = dict[str, Any]


class Warnings:
    """Shows the warnings of a stage and writes them to its `warnings.jsonl` ({"step", "kind", "text"}), each kind once.

    Create it after the log was rewound: warnings already in the file, also of earlier sessions, are not repeated.
    """

    def __init__(
        self, experiment: Experiment, stage: Stage, folder: Path, log: MetricsLog, show: Callable[[str], None]
    ) -> None:
        self.stage, self.log, self.show = stage, log, show
        self.possible = {
            kind: (one, min(one.steps, stage.steps)) for kind, one in stage.objective.metric_warnings.items()
        }
        lines = read_lines(folder / "metrics.jsonl") if self.possible and log.active else []
        self.recent: deque[Line] = deque(lines[-WARNING_STEPS:], maxlen=WARNING_STEPS)
        self.told = {line.get("kind") for line in read_lines(folder / "warnings.jsonl")} if log.active else set()
        if experiment.model.param_dtype != "float32" and not stage.optimizer.master_weights:
            self.add(
                "master_weights",
                f"{stage.name}.optimizer.master_weights is false: most updates are too small for {experiment.model.param_dtype} "
                "parameters and are rounded away",
            )

    def see(self, line: Line) -> None:
        """Check a step's metrics for warning signs."""
        self.recent.append(line)
        for kind, text in found(self.possible, list(self.recent), vars(self.stage.objective)):
            self.add(kind, text, line["step"])

    def add(self, kind: str, text: str, step: int = 0) -> None:
        """Show and log a warning, unless one of its kind was already."""
        if kind in self.told:
            return
        self.told.add(kind)
        self.log.warning({"step": step, "kind": kind, "text": text})
        self.show(f"{self.stage.name}: {text}")


def found(
    possible: dict[str, tuple[MetricWarning, int]], lines: Sequence[Line], objective: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(kind, text) of each warning whose condition held in the last steps, for as many steps as it requires."""
    for kind, (warning, steps) in possible.items():
        last = lines[-steps:]
        if len(last) == steps and all(map(warning.shows, last)):
            yield kind, warning.text.format(**objective | last[-1] | {"steps": steps})
