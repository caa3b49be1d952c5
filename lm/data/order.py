"""Data order: shuffles and mixtures as pure functions of an integer position, without state."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64, UInt64

from lm.data.curriculum.draw import mix64

ROUNDS = 4


def permute(place: int, length: int, key: int) -> int:
    """The image of `place` under the pseudo-random permutation of range(length) that `key` selects.

    A balanced Feistel network over the next even number of bits; a value past the end is permuted again until it is
    in range (cycle walking: Black and Rogaway 2002, Ciphers with arbitrary finite domains).
    """
    if length == 1:
        return 0
    half = ((length - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix64(mix64(key + turn) ^ right) & mask)
        place = left << half | right
        if place < length:
            return place


def permutation(length: int, key: int) -> Int64[np.ndarray, " N"]:
    """The whole permutation: `permute` of every place, vectorised."""
    places = np.arange(length)
    if length == 1:
        return places
    half = ((length - 1).bit_length() + 1) // 2
    mask, turns = (1 << half) - 1, [np.uint64(mix64(key + turn)) for turn in range(ROUNDS)]
    walking = np.arange(length)
    while len(walking):
        left, right = (x.astype(np.uint64) for x in (places[walking] >> half, places[walking] & mask))
        for turn in turns:
            left, right = right, left ^ (_mix64s(turn ^ right) & np.uint64(mask))
        places[walking] = left << np.uint64(half) | right
        walking = walking[places[walking] >= length]
    return places


def _mix64s(values: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """`mix64`, vectorised."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixture_shares(weights: Sequence[float]) -> list[Fraction]:
    """For each source its weight over the sum of its own and all later weights, exactly; the last is 1.

    The weights are positive, or zero for a source that is never drawn.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / rest if (rest := sum(exact[i:])) else Fraction(0) for i, weight in enumerate(exact)]


def mixture(index: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """(source, place in that source) of row `index` of a weighted mixture.

    Each source takes its share of the rows that the sources before it leave. So the places of a source are 0, 1, 2, …
    without a gap, and after n rows its number of rows is its share of n, to within one row for each source before it.
    """
    for source, share in enumerate(shares):
        taken = index * share.numerator // share.denominator
        if (index + 1) * share.numerator // share.denominator > taken:
            return source, taken
        index -= taken
    raise ValueError("the last share of a mixture must be 1")
