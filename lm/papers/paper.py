"""A paper's claim is a value: the sweeps that test it, and a function that judges it by what they have measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lm.files import defined_in, file_of
from lm.sweep.results import Result
from lm.sweep.statistics import Difference, Estimate, estimate

Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Curve:
    """Points (x, mean, low, high); low and high are nan where there is no interval."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves on the same axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Finding:
    """What came out: the verdict, why in a sentence or two with its numbers, a table, and drawings."""

    verdict: Verdict
    reason: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Evidence:
    """What a claim is judged by: the runs of its sweeps, by name. `quick`: the small ones, which decide nothing."""

    runs: Mapping[str, list[Result]]
    quick: bool = False


@dataclass(frozen=True)
class Paper:
    """A claim that can come out either way.

    Args:
        title, source: the claim in a few words; authors, year and where to find the paper.
        judge: from what was measured to what came out.
        sweeps: names of the sweeps in the paper's file; none: `judge` computes what it needs.
        quick: names of smaller ones, which show within a minute that it still works.
    """

    title: str
    source: str
    judge: Callable[[Evidence], Finding]
    sweeps: tuple[str, ...] = ()
    quick: tuple[str, ...] = field(default=())


def load(name: str) -> Paper:
    """The `paper` of a file in `experiments/papers`, by name; or a path. UserError where there is none."""
    return defined_in(file_of(spec(name)), "paper", Paper)


def spec(name: str) -> str:
    """How a paper's file is named everywhere else: `papers.NAME`; a path stays."""
    return name if name.endswith(".py") or name.startswith("papers.") else f"papers.{name}"


# ---- words for numbers -------------------------------------------------------------------------------------------


def by_seed(results: Sequence[Result], value: Callable[[Result], float]) -> dict[int, float]:
    """A number of every run that has it, by the run's seed."""
    found = {result.seed: value(result) for result in results if not result.failed}
    return {seed: number for seed, number in found.items() if math.isfinite(number)}


def where(results: Sequence[Result], **settings: str) -> list[Result]:
    """The runs with these settings, by the last part of the axis's name."""
    return [
        result for result in results if all(dict(_short(result)).get(name) == value for name, value in settings.items())
    ]


def setting(result: Result, name: str) -> str:
    """How one axis is set, by the last part of its name."""
    return dict(_short(result))[name]


def _short(result: Result) -> list[tuple[str, str]]:
    return [(name.rsplit(".", 1)[-1], value) for name, value in result.settings.items()]


def curve_point(x: float, values: Mapping[int, float]) -> tuple[float, float, float, float]:
    """(x, mean over seeds, ends of its 95 % interval)."""
    found = estimate(list(values.values()))
    return x, found.mean, found.mean - found.half, found.mean + found.half


def with_interval(found: Estimate, digits: int = 3) -> str:
    """1.234 ± 0.056 (n = 3)."""
    half = "" if math.isnan(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half} (n = {found.count})"


def difference(found: Difference, digits: int = 3) -> str:
    """+0.123 [0.045, 0.201], or that none was seen, with the smallest that would have been."""
    if math.isnan(found.low):
        return f"{found.mean:+.{digits}f} (one seed)"
    interval = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    if found.low <= 0 <= found.high:
        return f"{interval}, no difference seen (smallest that would have been: {found.detectable:.{digits}f})"
    return interval


def over_steps(
    results: Sequence[Result], points: Callable[[Result], Sequence[tuple[int, float]]]
) -> list[tuple[float, float, float, float]]:
    """Means over seeds and their intervals at every step that all runs have."""
    runs = [dict(points(result)) for result in results if not result.failed]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return [curve_point(step, dict(enumerate(run[step] for run in runs))) for step in steps]


def late(result: Result, stage: str, field: str, part: float = 0.1) -> float:
    """The mean of a field of the training's own lines over the last tenth of a stage."""
    values = [value for _, value in result.training(stage, field)]
    last = values[-max(1, round(part * len(values))) :]
    return math.fsum(last) / len(last) if last else math.nan
