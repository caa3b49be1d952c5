"""A paper's claim is a value: the sweeps that test it, and a function that judges it by what they have measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lm.files import defined_in, file_of
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, Difference, Point, curve_points, estimate

Verdict = Literal["holds", "does not hold", "undecided"]


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

    @property
    def results(self) -> list[Result]:
        """The runs of the first sweep."""
        return next(iter(self.runs.values()))


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
    quick: tuple[str, ...] = ()


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


def _short(result: Result) -> list[tuple[str, str]]:
    return [(name.rsplit(".", 1)[-1], value) for name, value in result.settings.items()]


def over_seeds(values: Mapping[int, float], digits: int = 3) -> str:
    """1.234 ± 0.056 (n = 3): the mean of a number over seeds."""
    found = estimate(list(values.values()))
    half = "" if math.isnan(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half} (n = {found.count})"


def by_sign(found: Difference, claimed: int) -> Verdict:
    """Whether a difference has the sign that is claimed, as far as its interval tells."""
    if not (found.low > 0 or found.high < 0):
        return "undecided"
    return "holds" if found.mean * claimed > 0 else "does not hold"


def difference(found: Difference, digits: int = 3) -> str:
    """+0.123 [0.045, 0.201], or that none was seen, with the smallest that would have been."""
    if math.isnan(found.low):
        return f"{found.mean:+.{digits}f} ({'one seed' if found.count < 2 else f'the same in {found.count} seeds'})"
    interval = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    if found.low <= 0 <= found.high:
        return f"{interval}, no difference seen (smallest that would have been: {found.detectable:.{digits}f})"
    return interval


def over_steps(results: Sequence[Result], points: Callable[[Result], Sequence[tuple[int, float]]]) -> list[Point]:
    """Means over seeds at every step that all runs have."""
    return curve_points([dict(points(result)) for result in results if not result.failed])


def late(result: Result, stage: str, field: str, part: float = 0.1) -> float:
    """The mean of a field of the training's own lines over the last tenth of a stage."""
    values = [value for _, value in result.training(stage, field)]
    last = values[-max(1, round(part * len(values))) :]
    return math.fsum(last) / len(last) if last else math.nan
