"""Statistics over a few seeds: confidence intervals, paired differences, Holm correction, power-law fits."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float, Int

LEVEL = 0.95  # confidence level of intervals
POWER = 0.8  # power at which the smallest detectable effect is computed
RESAMPLES = 9_999
FEWEST_RESAMPLED = 6
"""Least number of values for the bootstrap. With fewer its intervals cover too little: 82 % for three normal values,
where Student's t covers 95 % (benchmarks/coverage.py)."""


@dataclass(frozen=True)
class Estimate:
    """Mean of `count` independent values, and half the width of its 95 % confidence interval (nan for one value)."""

    mean: float
    half: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values with half its 95 % interval by Student's t, s t(0.975, n - 1) / √n; nan for n = 1."""
    count = len(values)
    mean = math.fsum(values) / count if values else math.nan
    if count < 2:
        return Estimate(mean, math.nan, count)
    if _all_equal(values):
        return Estimate(values[0], 0.0, count)
    return Estimate(mean, _standard_error(np.asarray(values)) * _t(count - 1, LEVEL), count)


Point = tuple[float, float, float, float]
"""(x, mean over seeds, lower and upper end of the mean's 95 % interval, nan for one seed)."""


@dataclass(frozen=True)
class Curve:
    """A labelled curve of means with 95 % intervals."""

    label: str
    points: Sequence[Point]


def curve_point(x: float, values: Sequence[float]) -> Point:
    """The point of a curve at x from the values of all seeds."""
    found = estimate(values)
    return x, found.mean, found.mean - found.half, found.mean + found.half


def curve_points(runs: Sequence[Mapping[float, float]]) -> list[Point]:
    """The points of a curve at every x that all runs (x -> value) have, in order."""
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    return [curve_point(x, [run[x] for run in runs]) for x in shared]


@dataclass(frozen=True)
class Difference:
    """Mean difference to a baseline over common seeds, its 95 % interval, and the p-value of no difference.

    `detectable` is the smallest true difference that this number of seeds with this spread detects at the 5 % level with
    a power of 80 %. `error` is the standard error. All but `mean` and `count` are nan for one seed, and if the difference
    is equal for all seeds (as at a metric's floor or ceiling), since there is no spread to estimate chance from.
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
    """Difference of two groups (seed -> value), paired by seed, which removes effects of the seed on both.

    With six or more seeds the interval is the studentised bootstrap's over seeds (Efron and Tibshirani 1993, section
    12.5), else Student's t. The p-value is of the same test.
    """
    both = sorted(set(values) & set(baseline))
    differences = np.array([values[seed] - baseline[seed] for seed in both])
    count = len(both)
    if count == 0:
        return NO_DIFFERENCE
    mean = float(differences.mean())
    if count == 1 or _all_equal(differences, max(abs(values[seed]) for seed in both)):
        return Difference(mean, math.nan, math.nan, math.nan, count, math.nan, math.nan)
    error = _standard_error(differences)
    if count < FEWEST_RESAMPLED:
        low_t = high_t = _t(count - 1, LEVEL)
        p = 2 * float(scipy.stats.t.sf(abs(mean) / error, count - 1))
    else:
        drawn = _studentised(differences)
        lower, low_t = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        high_t = -lower
        p = _two_sided(drawn, mean / error)
    return Difference(mean, mean - low_t * error, mean + high_t * error, p, count, detectable(error, count), error)


def _all_equal(values: Sequence[float] | Float[np.ndarray, " N"], scale: float = 0.0) -> bool:
    """Whether all values are equal up to rounding; `scale` is the magnitude of the numbers they are differences of."""
    return float(np.ptp(values)) <= 1e-12 * max(scale, *np.abs(values))


def _standard_error(values: Float[np.ndarray, " N"]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


@functools.lru_cache(maxsize=1024)
def _t(freedom: int, level: float) -> float:
    return float(scipy.stats.t.isf((1 - level) / 2, freedom))


def _studentised(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " R"]:
    """t statistics of bootstrap resamples (fixed seed) about the mean; resamples without spread are left out."""
    resampled = values[_draws(len(values))]
    spread = resampled.std(axis=1, ddof=1)
    kept = spread > 1e-12 * abs(values).max()
    return (resampled.mean(axis=1) - values.mean())[kept] / (spread[kept] / math.sqrt(len(values)))


@functools.lru_cache(maxsize=8)
def _draws(count: int) -> Int[np.ndarray, "R N"]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _two_sided(drawn: Float[np.ndarray, " R"], t: float) -> float:
    more, less = int((drawn >= t).sum()), int((drawn <= t).sum())
    return min(1.0, 2 * (min(more, less) + 1) / (len(drawn) + 1))


def detectable(error: float, count: int, level: float = 1 - LEVEL) -> float:
    """Smallest true mean that a two-sided t-test of `count` values with this standard error detects with a power of 80 %."""
    return error * _detectable_errors(count, level)


@functools.lru_cache(maxsize=1024)
def _detectable_errors(count: int, level: float) -> float:
    """`detectable` in standard errors."""
    threshold = _t(count - 1, 1 - level)

    def missing(effect: float) -> float:
        return POWER - float(scipy.stats.nct.sf(threshold, count - 1, effect))

    return float(scipy.optimize.brentq(missing, 1e-6, 60 * threshold))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values with Holm's correction for multiple comparisons (Holm 1979); nan stays nan and is not counted."""
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
    """Fit a power law by least squares of log y on log x; the interval is by Student's t, nan for two points.

    Raises ValueError for fewer than two distinct x, or for numbers that are not positive.
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError("a power law needs two different x, and positive numbers")
    fit = scipy.stats.linregress(np.log(x), np.log(y))
    half = _t(len(x) - 2, LEVEL) * fit.stderr if len(x) > 2 else math.nan
    return PowerLaw(math.exp(fit.intercept), fit.slope, fit.slope - half, fit.slope + half)
