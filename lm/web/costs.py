"""Costs of a run: time, tokens and memory of every stage, and its goodput."""

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
    """Table rows: (stage, steps, a value for each of COSTS and the median tokens per second) of each started stage."""
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
    """A share of a stage's time: colour, label, duration, percent."""

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
    """(stage, goodput in percent, shares of its time) for each finished stage."""
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
