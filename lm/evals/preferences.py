"""What a reward model is worth on pairs, from the gaps of its scores: accuracy, calibration, and what length alone would do."""

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
    """A mean over pairs, and the ends of its 95 % interval by bootstrap over prompts."""

    mean: float
    low: float
    high: float


class Bin(NamedTuple):
    """Pairs that are alike: their mean (a probability, a difference of length), how often the model is right, how many."""

    mean: float
    right: float
    pairs: int


class Worth(NamedTuple):
    """A reward model on some pairs. `baseline` takes the longer (or, `shorter`, the shorter) answer; `lead` is over it."""

    accuracy: BootstrapEstimate
    log_loss: float
    calibration_error: float
    calibration: list[Bin]
    by_length: list[Bin]
    baseline: BootstrapEstimate
    shorter: bool
    lead: BootstrapEstimate


def worth(gaps: Numbers, longer: Numbers, shorter: bool, prompts: Sequence[str], seed: int = 0) -> Worth:
    """Measures of pairs, given the gap of scores and of lengths (chosen less rejected) in each.

    Args:
        prompts: of each pair; what is said of one prompt's pairs hangs together, so intervals resample prompts.
        shorter: whether the length-only baseline takes the shorter answer; to be decided on other pairs than these.
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
    """1 where a gap is right, 0 where it is wrong, a half where it is 0."""
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
    """How sure the model is that the answer it likes better is the chosen one, σ(|gap|), against how often it is.

    Of equal bins from 0.5 to 1 those that have pairs (expected calibration error: arXiv:1706.04599, eq. 3).
    """
    sure = 1 / (1 + np.exp(-np.abs(gaps)))
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [_bin(sure[place == i], gaps[place == i]) for i in range(BINS) if (place == i).any()]


def length_bins(gaps: Numbers, longer: Numbers) -> list[Bin]:
    """Accuracy where the chosen answer is much shorter, shorter, …, much longer than the rejected: bins of as many pairs."""
    parts = np.array_split(np.argsort(longer, kind="stable"), min(LENGTH_BINS, len(longer)))
    return [_bin(longer[part], gaps[part]) for part in parts]


def prefers_shorter(longer: Numbers) -> bool:
    """Whether the shorter answer is the chosen one more often."""
    return share_right(longer) < 0.5


def _bin(values: Numbers, gaps: Numbers) -> Bin:
    return Bin(float(values.mean()), share_right(gaps), len(gaps))
