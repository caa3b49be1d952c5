"""What a stage warns of, once: signs in its metrics that it learns nothing, and what its batches note."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.config.objective import SIGN_STEPS, Sign
from lm.experiment import Experiment, Stage
from lm.train.metrics import MetricsLog, read_lines

Line = dict[str, Any]


class Warnings:
    """Warnings of a stage: shown, and written to its `warnings.jsonl` ({"step", "kind", "text"}), each kind once.

    Make it when the log has been rewound: what was written before, in an earlier session too, is not said again.
    """

    def __init__(
        self, experiment: Experiment, stage: Stage, folder: Path, log: MetricsLog, show: Callable[[str], None]
    ) -> None:
        self.stage, self.log, self.show = stage, log, show
        self.signs = {kind: (sign, min(sign.steps, stage.steps)) for kind, sign in stage.objective.signs.items()}
        lines = read_lines(folder / "metrics.jsonl") if self.signs and log.active else []
        self.recent: deque[Line] = deque(lines[-SIGN_STEPS:], maxlen=SIGN_STEPS)
        self.told = {line.get("kind") for line in read_lines(folder / "warnings.jsonl")} if log.active else set()
        if experiment.model.param_dtype != "float32" and not stage.optimizer.master_weights:
            self.add(
                "master_weights",
                f"{stage.name}.optimizer.master_weights is false: most updates are smaller than {experiment.model.param_dtype} "
                "parameters can hold, and are lost",
            )

    def see(self, line: Line) -> None:
        """Look at the metrics of the next step."""
        self.recent.append(line)
        for kind, text in found(self.signs, list(self.recent), vars(self.stage.objective)):
            self.add(kind, text, line["step"])

    def add(self, kind: str, text: str, step: int = 0) -> None:
        """Show and keep a warning, unless one of its kind was."""
        if kind in self.told:
            return
        self.told.add(kind)
        self.log.warning({"step": step, "kind": kind, "text": text})
        self.show(f"{self.stage.name}: {text}")


def found(
    signs: dict[str, tuple[Sign, int]], lines: Sequence[Line], objective: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(kind, text) of every sign that the last lines show, as many as it takes."""
    for kind, (sign, steps) in signs.items():
        last = lines[-steps:]
        if len(last) == steps and all(map(sign.shows, last)):
            yield kind, sign.text.format(**objective | last[-1] | {"steps": steps})
