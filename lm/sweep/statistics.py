"""What may be concluded from a few seeds: intervals, paired differences, corrections for many, fits with their doubt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float

LEVEL = 0.95  # of intervals
POWER = 0.8  # with which the smallest effect would have been seen
RESAMPLES = 9_999
FEWEST_RESAMPLED = 6
"""Below, a bootstrap has too few values to draw from, and its intervals too little coverage: 82 % for three normal ones,
where Student's t has 95 % (benchmarks/coverage.py)."""


@dataclass(frozen=True)
class Estimate:
    """A mean of independent values; half the width of its 95 % interval, nan for one value; and how many there are."""

    mean: float
    half: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values and half its 95 % interval by Student's t, s t(0.975, n - 1) / √n; nan for n = 1."""
    count = len(values)
    mean = math.fsum(values) / count if values else math.nan
    if count < 2:
        return Estimate(mean, math.nan, count)
    if _without_spread(values):
        return Estimate(values[0], 0.0, count)
    return Estimate(mean, _standard_error(np.asarray(values)) * _t(count - 1, LEVEL), count)


Point = tuple[float, float, float, float]
"""x, the mean over seeds of a number there, and the ends of its 95 % interval, nan for one seed."""


@dataclass(frozen=True)
class Curve:
    """A number over something else, with its doubt."""

    label: str
    points: Sequence[Point]


def curve_point(x: float, values: Sequence[float]) -> Point:
    """A point of a curve from the values of the seeds there."""
    found = estimate(values)
    return x, found.mean, found.mean - found.half, found.mean + found.half


def curve_points(runs: Sequence[Mapping[float, float]]) -> list[Point]:
    """A point at every x that all runs have, in order."""
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    return [curve_point(x, [run[x] for run in runs]) for x in shared]


@dataclass(frozen=True)
class Difference:
    """Mean difference to a baseline over the seeds that both have, its 95 % interval, and the p-value of none.

    `detectable` is the smallest true difference that so many seeds with this spread would show, at the 5 % level, with a
    power of 80 %; `error` is the standard error. All but `mean` and `count` are nan for one seed, and where the difference
    is the same in all of them, as at the floor or the ceiling of a metric: without a spread nothing is known of chance.
    """

    mean: float
    low: float
    high: float
    p: float
    count: int
    detectable: float
    error: float


NO_DIFFERENCE = Difference(math.nan, math.nan, math.nan, math.nan, 0, math.nan, math.nan)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """The difference within each seed, which takes out what a seed does to both.

    From six seeds on the interval is the studentised bootstrap's over seeds (Efron and Tibshirani 1993, section 12.5), else
    Student's t; the p-value is of the same test.
    """
    both = sorted(set(values) & set(baseline))
    differences = np.array([values[seed] - baseline[seed] for seed in both])
    count = len(both)
    if count == 0:
        return NO_DIFFERENCE
    mean = float(differences.mean())
    if count == 1 or _without_spread(differences, max(abs(values[seed]) for seed in both)):
        return Difference(mean, math.nan, math.nan, math.nan, count, math.nan, math.nan)
    error = _standard_error(differences)
    if count < FEWEST_RESAMPLED:
        low_t = high_t = _t(count - 1, LEVEL)
        p = 2 * float(scipy.stats.t.sf(abs(mean) / error, count - 1))
    else:
        drawn = _studentised(differences)
        high_t, low_t = -np.quantile(drawn, (1 - LEVEL) / 2), np.quantile(drawn, (1 + LEVEL) / 2)
        p = _two_sided(drawn, mean / error)
    return Difference(mean, mean - low_t * error, mean + high_t * error, p, count, detectable(error, count), error)


def _without_spread(values: Sequence[float] | Float[np.ndarray, " N"], scale: float = 0.0) -> bool:
    """Whether values are all equal but for rounding; `scale` is the size of the numbers whose differences they are."""
    return float(np.ptp(values)) <= 1e-12 * max(scale, *np.abs(values))


def _standard_error(values: Float[np.ndarray, " N"]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _t(freedom: int, level: float) -> float:
    return float(scipy.stats.t.isf((1 - level) / 2, freedom))


def _studentised(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " R"]:
    """t of the mean of every resample about the mean of all, always the same resamples; those without a spread left out."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    resampled = values[draws]
    spread = resampled.std(axis=1, ddof=1)
    kept = spread > 1e-12 * abs(values).max()
    return (resampled.mean(axis=1) - values.mean())[kept] / (spread[kept] / math.sqrt(len(values)))


def _two_sided(drawn: Float[np.ndarray, " R"], t: float) -> float:
    more, less = int((drawn >= t).sum()), int((drawn <= t).sum())
    return min(1.0, 2 * (min(more, less) + 1) / (len(drawn) + 1))


def detectable(error: float, count: int, level: float = 1 - LEVEL) -> float:
    """The true mean that a two-sided t-test of `count` values with this standard error finds with a power of 80 %."""
    threshold = _t(count - 1, 1 - level)

    def missing(effect: float) -> float:
        return POWER - float(scipy.stats.nct.sf(threshold, count - 1, effect))

    return error * float(scipy.optimize.brentq(missing, 1e-6, 60 * threshold))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for having looked at so many at once (Holm 1979); nan stays nan and counts as no look."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        least = corrected[i] = max(least, min(1.0, (len(order) - rank) * p))
    return corrected


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent, with the 95 % interval of the exponent."""

    factor: float
    exponent: float
    low: float
    high: float


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares of log y on log x; the interval is of the t of the residuals, nan for two points.

    Raises ValueError for fewer than two different x, or a number that has no logarithm.
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError("a power law needs two different x, and positive numbers")
    fit = scipy.stats.linregress(np.log(x), np.log(y))
    half = _t(len(x) - 2, LEVEL) * fit.stderr if len(x) > 2 else math.nan
    return PowerLaw(math.exp(fit.intercept), fit.slope, fit.slope - half, fit.slope + half)
