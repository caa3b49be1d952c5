"""Statistics of choices: agreement, side and length bias, win rates and strengths, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Z = 1.959963984540054  # half of a 95 % interval, in standard deviations
MISSING = -1
STEPS = 100


class Share(NamedTuple):
    """A share of `n` choices and its 95 % interval; NaN where there are none."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Strengths:
    """Log-odds of each source of beating an average source (their sum is 0), with 95 % intervals."""

    values: Float[np.ndarray, " S"]
    low: Float[np.ndarray, " S"]
    high: Float[np.ndarray, " S"]


def cohen_kappa(first: Int[np.ndarray, " N"], second: Int[np.ndarray, " N"]) -> float:
    """Cohen's kappa of two annotators on N units: agreement beyond chance; NaN without units or variety.

    Source: Cohen, A coefficient of agreement for nominal scales, 1960: (p_o - p_e) / (1 - p_e).
    """
    if len(first) == 0:
        return math.nan
    kinds = np.union1d(first, second)
    observed = float(np.mean(first == second))
    expected = sum(float(np.mean(first == kind) * np.mean(second == kind)) for kind in kinds)
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorff_alpha(ratings: Int[np.ndarray, "A U"]) -> float:
    """Krippendorff's alpha of any number of annotators on U nominal units; unjudged units are MISSING.

    NaN without units or variety.

    Source: Krippendorff, Computing Krippendorff's alpha-reliability, 2011, section C, with coincidences of values.
    """
    kinds = np.unique(ratings[ratings != MISSING])
    counts = np.stack([(ratings == kind).sum(0) for kind in kinds]).astype(float) if len(kinds) else np.zeros((0, 0))
    counts = counts[:, counts.sum(0) >= 2] if counts.size else counts
    if counts.size == 0:
        return math.nan
    judges = counts.sum(0)
    coincidences = (counts / (judges - 1)) @ counts.T - np.diag((counts / (judges - 1)).sum(1))
    totals = coincidences.sum(1)
    pairs = totals.sum()
    by_chance = pairs**2 - (totals**2).sum()
    return float(1 - (pairs - 1) * (pairs - np.trace(coincidences)) / by_chance) if by_chance > 0 else math.nan


def wilson(value: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion in `count` independent trials.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    middle = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(scores: Float[np.ndarray, " N"], groups: Sequence[str | int]) -> Share:
    """The mean of scores in [0, 1] with an interval that accounts for correlated scores within a group.

    Wilson's interval for the effective number of trials given the variance between groups, at most N. Where all
    groups are equal that variance is 0, and every group counts as one trial.
    """
    if len(scores) == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    value = float(np.mean(scores))
    _, group = np.unique(np.array(groups), return_inverse=True)
    variance = float(np.sum(np.bincount(group, scores - value) ** 2)) / len(scores) ** 2
    even = variance < 1e-15
    trials = float(group.max() + 1) if even else min(len(scores), value * (1 - value) / variance)
    return Share(value, *wilson(value, trials), len(scores))


def bradley_terry(
    first: Int[np.ndarray, " N"],
    second: Int[np.ndarray, " N"],
    scores: Float[np.ndarray, " N"],
    groups: Sequence[str | int],
    sources: int,
) -> Strengths | None:
    """Bradley-Terry strengths by maximum likelihood: differences are log-odds of winning; None without a maximum.

    A maximum exists only if a chain of wins leads from every source to every other one. The interval is from the
    sandwich covariance with one cluster per group, so that it stays valid if one prompt is judged often.

    Args:
        first, second: the sources compared, as numbers below `sources`.
        scores: 1 if the first won, 0 if the second did, 1/2 for a tie.
        groups: group of each choice (its prompt); choices of one group are correlated.

    Source: Bradley and Terry, Rank analysis of incomplete block designs, 1952; ties as half a win each.
    """
    if not _all_reach_all(first, second, scores, sources):
        return None
    design = np.zeros((len(first), sources))
    design[np.arange(len(first)), first] += 1
    design[np.arange(len(first)), second] -= 1
    values = np.zeros(sources)
    for _ in range(STEPS):
        odds = 1 / (1 + np.exp(-design @ values))
        inverse = np.linalg.pinv(design.T @ (design * (odds * (1 - odds))[:, None]))
        move = inverse @ (design.T @ (scores - odds))
        values = values + move * min(1.0, 2.0 / max(float(np.abs(move).max()), 1e-12))  # a limited step
        if np.abs(move).max() < 1e-10:
            break
    _, group = np.unique(np.array(groups), return_inverse=True)
    pulls = np.zeros((int(group.max()) + 1, sources))
    np.add.at(pulls, group, design * (scores - odds)[:, None])
    half = Z * np.sqrt(np.diag(inverse @ (pulls.T @ pulls) @ inverse))
    return Strengths(values, values - half, values + half)


def _all_reach_all(
    first: Int[np.ndarray, " N"], second: Int[np.ndarray, " N"], scores: Float[np.ndarray, " N"], sources: int
) -> Bool[np.ndarray, ""] | bool:
    """Whether a chain of wins leads from every source to every other (Ford, 1957)."""
    beaten = np.eye(sources, dtype=bool)
    beaten[first[scores > 0], second[scores > 0]] = True
    beaten[second[scores < 1], first[scores < 1]] = True
    for _ in range(sources):
        beaten = (beaten.astype(int) @ beaten.astype(int)) > 0
    return bool(beaten.all())
