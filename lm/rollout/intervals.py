"""Answers that are an interval or a union of some: an inequality of one variable (`0 ≤ x < 1`, `7 > x > 5`, `x > 5`), or brackets (`[0, 1)`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_RELATION = re.compile(r"\s*([<>≤≥])\s*")
_NAME = re.compile(r"\\?[A-Za-z]\w*(?:_\{\w+\})?")
_CONSTANTS = {"e", "pi"}
_BRACKETS = re.compile(r"(?P<left>[(\[])(?P<low>[^()\[\],]+),(?P<high>[^()\[\],]+)(?P<right>[)\]])")
_UNION = re.compile(r"\s*(?:∪|\\cup(?![a-zA-Z])|\bor\b)\s*")
_INFINITY = re.compile(r"([+-]?)\s*(?:∞|\\?inf(?:inity|ty)?)")

Same = Callable[[str, str], bool | None]  # of two limits


class Interval(NamedTuple):
    """The numbers between two ends; an end without a limit is ""."""

    name: str  # the variable of an inequality; "" of brackets
    low: str
    high: str
    with_low: bool
    with_high: bool


def interval(text: str) -> Interval | None:
    """The interval that an answer names; None for another answer, such as an inequality that is not solved for its variable."""
    if brackets := _BRACKETS.fullmatch(text):
        low, high = _limit(brackets["low"], "-"), _limit(brackets["high"], "")
        with_low, with_high = brackets["left"] == "[", brackets["right"] == "]"
        return Interval("", low, high, with_low and low != "", with_high and high != "")
    sides, relations = _RELATION.split(text)[::2], _RELATION.findall(text)
    if not all(sides) or (set(relations) & set("<≤") and set(relations) & set(">≥")):
        return None
    if relations and relations[0] in ">≥":
        sides, relations = sides[::-1], relations[::-1]
    places = [at for at, side in enumerate(sides) if _NAME.fullmatch(side) and side not in _CONSTANTS]
    if len(places) != 1 or len(sides) not in (2, 3) or (len(sides) == 3 and places != [1]):
        return None
    place = places[0]
    low, high = (sides[0] if place else "", sides[place + 1] if place + 1 < len(sides) else "")
    low, high = _limit(low, "-"), _limit(high, "")
    inclusive = [relation in "≤≥" for relation in relations]
    return Interval(sides[place], low, high, low != "" and inclusive[0], high != "" and inclusive[-1])


def _limit(text: str, sign: str) -> str:
    """A limit; infinity of this sign is none."""
    infinite = _INFINITY.fullmatch(text.strip())
    return "" if infinite and infinite[1].strip("+") == sign else text.strip()


def interval_union(text: str) -> tuple[Interval, ...] | None:
    """The intervals of `(-∞, 1) ∪ (3, ∞)` or `x < 1 or x > 3`; of one interval that one; None for another answer."""
    found = [interval(part) for part in _UNION.split(text)]
    return None if None in found else tuple(one for one in found if one)


def same_union(given: Sequence[Interval], expected: Sequence[Interval], same: Same) -> bool | None:
    """Whether two unions have the same intervals, in any order; None if comparing limits, by `same`, took too long.

    `(a, b)`, which may be a point, is no answer where an inequality is expected.
    """
    names = {one.name for one in (*given, *expected)} - {""}
    if len(names) > 1 or len(given) != len(expected) or (expected[0].name and any(map(_may_be_point, given))):
        return False
    rows = [[_same_interval(one, other, same) for other in expected] for one in given]
    found = [True if True in row else None if None in row else False for row in (*rows, *zip(*rows, strict=True))]
    return False if False in found else None if None in found else True


def _may_be_point(one: Interval) -> bool:
    return not one.name and all(one[1:3]) and not any(one[3:])


def _same_interval(given: Interval, expected: Interval, same: Same) -> bool | None:
    if given[3:] != expected[3:] or [bool(end) for end in given[1:3]] != [bool(end) for end in expected[1:3]]:
        return False
    found = [same(one, other) for one, other in ((given.low, expected.low), (given.high, expected.high)) if other]
    return False if False in found else None if None in found else True
