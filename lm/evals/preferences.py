"""Quality of a reward model on pairs, from its score gaps: accuracy, calibration, and a length-only baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lm.evals.pairs import share_right

RESAMPLES = 10_000
BINS = 10  # of calibration
LENGTH_BINS = 5

Numbers = Float[np.ndarray, " N"]


class BootstrapEstimate(NamedTuple):
    """A mean over pairs with its 95 % interval by bootstrap over prompts."""

    mean: float
    low: float
    high: float


class Bin(NamedTuple):
    """A bin of pairs: mean of the binned value (a probability or a length gap), accuracy, number of pairs."""

    mean: float
    right: float
    pairs: int


class Worth(NamedTuple):
    """Measures of a reward model. `baseline` prefers the longer (with `shorter` the shorter) answer; `lead` is over it."""

    accuracy: BootstrapEstimate
    log_loss: float
    calibration_error: float
    calibration: list[Bin]
    by_length: list[Bin]
    baseline: BootstrapEstimate
    shorter: bool
    lead: BootstrapEstimate


def worth(gaps: Numbers, longer: Numbers, shorter: bool, prompts: Sequence[str], seed: int = 0) -> Worth:
    """Compute the measures from each pair's score gap and length gap (chosen less rejected).

    Args:
        prompts: prompt of each pair; pairs of one prompt are correlated, so intervals resample prompts.
        shorter: whether the length-only baseline prefers the shorter answer; to be decided on other pairs.
    """
    right, by_length = outcomes(gaps), outcomes(-longer if shorter else longer)
    table = calibration(gaps)
    return Worth(
        accuracy=bootstrap(right, prompts, seed),
        log_loss=float(np.logaddexp(0, -gaps).mean()),
        calibration_error=sum(one.pairs * abs(one.mean - one.right) for one in table) / len(gaps),
        calibration=table,
        by_length=length_bins(gaps, longer),
        baseline=bootstrap(by_length, prompts, seed),
        shorter=shorter,
        lead=bootstrap(right - by_length, prompts, seed),
    )


def outcomes(gaps: Numbers) -> Numbers:
    """1 for a positive gap, 0 for a negative one, 0.5 for 0."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def bootstrap(values: Numbers, groups: Sequence[str], seed: int = 0) -> BootstrapEstimate:
    """Mean, and the 2.5 and 97.5 percentiles of RESAMPLES means, each over as many groups, drawn with replacement."""
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    totals, sizes = np.bincount(place, values), np.bincount(place)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, 100):
        drawn = rng.integers(0, len(sizes), (100, len(sizes)))
        means.append(totals[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return BootstrapEstimate(float(values.mean()), float(low), float(high))


def calibration(gaps: Numbers) -> list[Bin]:
    """Calibration bins: the model's confidence in its preferred answer, σ(|gap|), against its accuracy.

    The non-empty ones of equal bins from 0.5 to 1 (expected calibration error: arXiv:1706.04599, eq. 3).
    """
    sure = 1 / (1 + np.exp(-np.abs(gaps)))
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [_bin(sure[place == i], gaps[place == i]) for i in range(BINS) if (place == i).any()]


def length_bins(gaps: Numbers, longer: Numbers) -> list[Bin]:
    """Accuracy by length gap, in bins of equally many pairs."""
    parts = np.array_split(np.argsort(longer, kind="stable"), min(LENGTH_BINS, len(longer)))
    return [_bin(longer[part], gaps[part]) for part in parts]


def prefers_shorter(longer: Numbers) -> bool:
    """Whether the shorter answer is the chosen one more often."""
    return share_right(longer) < 0.5


def _bin(values: Numbers, gaps: Numbers) -> Bin:
    return Bin(float(values.mean()), share_right(gaps), len(gaps))
