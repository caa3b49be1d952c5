"""The `Paper` value: a claim, the sweeps that test it, and a function from their results to a verdict."""

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
    """A chart of several curves."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Finding:
    """The result of judging a claim: verdict, reason (a sentence or two with numbers), a table, and charts."""

    verdict: Verdict
    reason: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Evidence:
    """The runs that a claim is judged by, sweep name -> runs. With `quick` they are small ones that only test the code."""

    runs: Mapping[str, list[Result]]
    quick: bool = False

    @property
    def results(self) -> list[Result]:
        """The runs of the first sweep."""
        return next(iter(self.runs.values()))


@dataclass(frozen=True)
class Paper:
    """A claim of a paper that an experiment can confirm or refute.

    Args:
        title: the claim in a few words.
        source: authors, year and where to find the paper.
        judge: function from the runs to the verdict.
        sweeps: names of the sweeps in the paper's file; (): `judge` needs no runs.
        quick: names of smaller sweeps that test the code within a minute.
    """

    title: str
    source: str
    judge: Callable[[Evidence], Finding]
    sweeps: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


def load(name: str) -> Paper:
    """Load the value `paper` of a file, by name in `experiments/papers` or by path. Raises UserError if there is none."""
    return defined_in(file_of(paper_file(name)), "paper", Paper)


def paper_file(name: str) -> str:
    """The name of a paper's file for `file_of`: `papers.NAME`, or a path unchanged."""
    return name if name.endswith(".py") or name.startswith("papers.") else f"papers.{name}"


# ---- helpers for `judge` -----------------------------------------------------------------------------------------


def by_seed(results: Sequence[Result], value: Callable[[Result], float]) -> dict[int, float]:
    """Seed -> value for the runs that did not fail, without values that are not finite."""
    found = {result.seed: value(result) for result in results if not result.failed}
    return {seed: number for seed, number in found.items() if math.isfinite(number)}


def where(results: Sequence[Result], **settings: str) -> list[Result]:
    """The runs with these settings; axes are named by the last part of their dotted name."""
    return [
        result for result in results if all(dict(_short(result)).get(name) == value for name, value in settings.items())
    ]


def _short(result: Result) -> list[tuple[str, str]]:
    return [(name.rsplit(".", 1)[-1], value) for name, value in result.settings.items()]


def mean_text(values: Mapping[int, float], digits: int = 3) -> str:
    """The mean over seeds as text, `1.234 ± 0.056 (n = 3)`, with half its 95 % interval."""
    found = estimate(list(values.values()))
    half = "" if math.isnan(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half} (n = {found.count})"


def sign_verdict(found: Difference, claimed: int) -> Verdict:
    """The verdict on a claimed sign: undecided if the difference's interval contains 0."""
    if not (found.low > 0 or found.high < 0):
        return "undecided"
    return "holds" if found.mean * claimed > 0 else "does not hold"


def difference(found: Difference, digits: int = 3) -> str:
    """A difference as text, `+0.123 [0.045, 0.201]`; if the interval contains 0, with the smallest detectable one."""
    if math.isnan(found.low):
        return f"{found.mean:+.{digits}f} ({'one seed' if found.count < 2 else f'the same in {found.count} seeds'})"
    interval = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    if found.low <= 0 <= found.high:
        return f"{interval}, no difference seen (smallest that would have been: {found.detectable:.{digits}f})"
    return interval


def over_steps(results: Sequence[Result], points: Callable[[Result], Sequence[tuple[int, float]]]) -> list[Point]:
    """Points of a curve: means over seeds at every step that all runs have."""
    return curve_points([dict(points(result)) for result in results if not result.failed])


def late_mean(result: Result, stage: str, field: str, part: float = 0.1) -> float:
    """Mean of a training metric over the last `part` of a stage's steps."""
    values = [value for _, value in result.training(stage, field)]
    last = values[-max(1, round(part * len(values))) :]
    return math.fsum(last) / len(last) if last else math.nan
