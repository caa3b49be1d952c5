"""What a run took: time, tokens and memory of every stage, and where its time went."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from lm.train.run_files import Run
from lm.web.numbers import count, duration, percent

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time", duration),
    "tokens": ("tokens", count),
    "compile_seconds": ("compiling", duration),
    "first_step_seconds": ("first step at", duration),
    "eval_seconds": ("evaluating", duration),
    "sample_seconds": ("sampling", duration),
    "peak_memory_mb": ("peak memory", lambda value: f"{value / 1000:.2f} GB"),
}


def costs(run: Run) -> list[tuple[str, str, list[str | None]]]:
    """(stage, steps, a value for every row of COSTS and the median tokens per second) for each stage that began."""
    rows = []
    for stage in run.stages:
        if not stage.metrics and not stage.summary:
            continue
        summary = stage.summary or {"seconds": stage.metrics[-1].get("time")}
        values = [show(summary[key]) if summary.get(key) is not None else None for key, (_, show) in COSTS.items()]
        speeds = [line["tokens_per_second"] for line in stage.metrics if "tokens_per_second" in line]
        steps = f"{stage.steps_done:,}" if stage.summary else f"{stage.steps_done:,} of {stage.steps:,}"
        rows.append((stage.name, steps, [*values, count(statistics.median(speeds)) if speeds else None]))
    return rows


@dataclass(frozen=True)
class TimeShare:
    """A part of a stage's time: the name of its colour, what it was spent on, how long, and of all in percent."""

    color: str
    label: str
    value: str
    percent: float


TIME: dict[str, str] = {
    "step_seconds": "training",
    "sample_seconds": "sampling",
    "data_seconds": "waiting for data",
    "compile_seconds": "compiling",
    "eval_seconds": "evaluating",
    "save_seconds": "saving",
    "start_seconds": "starting",
    "lost_seconds": "lost to restarts",
}
USEFUL = ("step_seconds", "sample_seconds")


def goodput(run: Run) -> list[tuple[str, str, list[TimeShare]]]:
    """(stage, the useful part of its time in percent, where all of it went) for each stage that is finished."""
    rows = []
    for stage in run.stages:
        spent = stage.summary or {}
        total = sum(spent.get(key, 0.0) for key in TIME)
        if "step_seconds" not in spent or not total:
            continue
        shares = [
            TimeShare(
                key.removesuffix("_seconds"), label, duration(spent.get(key, 0.0)), 100 * spent.get(key, 0.0) / total
            )
            for key, label in TIME.items()
        ]
        rows.append((stage.name, percent(sum(spent.get(key, 0.0) for key in USEFUL) / total), shares))
    return rows
