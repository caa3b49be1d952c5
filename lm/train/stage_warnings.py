"""Warnings of a stage, each shown once: signs in its metrics that it learns nothing, and notes of its batches."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm.config.objective import WARNING_STEPS, MetricWarning
from lm.experiment import Experiment, Stage
from lm.train.metrics import MetricsLog, read_lines

Line = dict[str, Any]


COLLAPSES = {
    "entropy": (
        0.1,
        "the policy samples nearly the same answer each time. entropy_coef, a higher clip_high or fewer steps help",
    ),
    "grad_norm": (0.01, "the policy hardly learns any more. Prompts that the model sometimes gets right help"),
    "completion_length": (0.2, "answers get very short, which some rewards favour. Look at them with `lm rollouts`"),
}
"""Metrics of stages that sample: the fraction of their mean over the first steps below which they have collapsed, and what it means."""
ACCURACIES = {"reward": "reward", "pass_at_k": "pass_at_1"}
"""Metrics of evals with an accuracy that training should raise, and its name."""


class Warnings:
    """Shows the warnings of a stage and writes them to its `warnings.jsonl` ({"step", "kind", "text"}), each kind once.

    Create it after the log was rewound: warnings already in the file, also of earlier sessions, are not repeated.
    """

    def __init__(self, experiment: Experiment, stage: Stage, log: MetricsLog, show: Callable[[str], None]) -> None:
        folder = log.folder
        self.stage, self.log, self.show = stage, log, show
        self.possible = {
            kind: (one, min(one.steps, stage.steps)) for kind, one in stage.objective.metric_warnings.items()
        }
        lines = read_lines(folder / "metrics.jsonl") if self.possible and log.active else []
        self.recent: deque[Line] = deque(lines[-WARNING_STEPS:], maxlen=WARNING_STEPS)
        self.first = lines[:WARNING_STEPS]
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
        if len(self.first) < WARNING_STEPS:
            self.first.append(line)
        o = self.stage.objective
        scored_by = ", ".join(filter(None, (*o.verifier_names, o.environment_name)))
        for kind, text in found(self.possible, list(self.recent), vars(o) | {"scored_by": scored_by}):
            self.add(kind, text, line["step"])
        if o.samples:
            for kind, text in collapsed(self.first, list(self.recent)):
                self.add(kind, text, line["step"])

    def compare_held_out(self) -> None:
        """Warn if the reward has risen while the accuracy of an eval has fallen; call it after an evaluation."""
        if not (self.log.active and self.stage.objective.samples):
            return
        evals, metrics = (read_lines(self.log.folder / f"{kind}.jsonl") for kind in ("eval", "metrics"))
        for name in dict.fromkeys(line["eval"] for line in evals if line["metric"] in ACCURACIES):
            step, text = diverged(name, metrics, [line for line in evals if line["eval"] == name])
            if text:
                self.add(f"held_out_falls_{name}", text, step)

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


def collapsed(first: Sequence[Line], last: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """(kind, text) of each metric of COLLAPSES that stayed far below its mean over the stage's first steps."""
    if min(len(first), len(last)) < WARNING_STEPS or first[-1]["step"] >= last[0]["step"]:
        return
    for name, (fraction, meaning) in COLLAPSES.items():
        before, now = ([_value(line, name) for line in lines] for lines in (first, last))
        if all(math.isfinite(value or math.nan) for value in before):
            start = statistics.fmean(before)
            if all(value < fraction * start for value in now):
                yield (
                    f"{name}_collapse",
                    f"in the {len(last)} steps up to step {last[-1]['step']} {name} was below {fraction:.0%} of its first value "
                    f"({start:.3g}, now {now[-1]:.3g}): {meaning}",
                )


def _value(line: Line, name: str) -> float:
    """A metric of a step; NaN where it is missing, or is the mean over no tokens, as where every answer was cut off and masked."""
    value = line.get(name)
    return math.nan if value is None or (value == 0 and line.get("eos_rate") == 0) else value


def diverged(name: str, metrics: Sequence[Line], evals: Sequence[Line]) -> tuple[int, str]:
    """(step, text) if an eval's accuracy has fallen from its best measurement while the reward of training rose, else (0, "").

    Both changes must exceed twice their standard error; the reward is the mean over WARNING_STEPS steps before a measurement (after
    one before the first step).
    """
    key = ACCURACIES[evals[-1]["metric"]]
    known = [line for line in evals if None not in (line.get(key), line.get(f"{key}_stderr"))]
    rewards = {line["step"]: line["reward"] for line in metrics if line.get("reward") is not None}
    if len(known) < 2 or not rewards:
        return 0, ""
    best, last = max(known, key=lambda line: line[key]), known[-1]
    before, after = (_rewards_at(rewards, line["step"]) for line in (best, last))
    fall, fall_error = best[key] - last[key], math.hypot(best[f"{key}_stderr"], last[f"{key}_stderr"])
    if min(len(before), len(after)) < 2 or not fall > 2 * fall_error:
        return 0, ""
    rise = statistics.fmean(after) - statistics.fmean(before)
    rise_error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (before, after)))
    if not rise > 2 * rise_error:
        return 0, ""
    return last["step"], (
        f"from step {best['step']} to step {last['step']} the reward rose from {statistics.fmean(before):.3g} to "
        f"{statistics.fmean(after):.3g} while the held-out accuracy of {name} fell from {best[key]:.3g} to {last[key]:.3g} (standard error "
        f"{fall_error:.2g}): the policy learns what the reward favours, not the task. The model of step {best['step']} was better"
    )


def _rewards_at(rewards: dict[int, float], step: int) -> list[float]:
    """The rewards of the WARNING_STEPS steps that end at a measurement, or of the first ones for one before them."""
    steps = sorted(rewards)
    chosen = [one for one in steps if one <= step][-WARNING_STEPS:] if step else steps[:WARNING_STEPS]
    return [rewards[one] for one in chosen]
