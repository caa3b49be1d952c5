"""Random choices that are a pure function of (stream, index): SplitMix64, the same on every machine and version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that looks random."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


class Draw:
    """A stream of random choices, one for each row."""

    def __init__(self, stream: int, index: int):
        self._state = mix64(mix64(stream + 1 & MASK) + index & MASK)

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        self._state = self._state + 0x9E3779B97F4A7C15 & MASK
        return mix64(self._state) * bound >> 64

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` options from different places, in random order."""
        places: list[int] = []
        while len(places) < count:
            place = self.below(len(options))
            if place not in places:
                places.append(place)
        return [options[place] for place in places]
