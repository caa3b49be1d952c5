"""Rules that judge an answer: each maps (row, completion) to a reward in [0, 1] and never raises."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from lm.data.curriculum.style import CLOSERS, undress
from lm.experiment import FUNCTION, UserError
from lm.user_functions import VERIFIER, is_function_name, load_function

Verifier = Callable[[Mapping[str, Any], str], float]

_MARKERS = re.compile(r"answer is:?|####|\\boxed\{", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


def answer(row: Mapping[str, Any], completion: str) -> float:
    r"""1 if the completion gives the row's answer, else 0.

    Given is what follows the last `answer is`, `####` or `\boxed{` on that line, else the whole completion;
    openers and closers are taken off first. Expected is the row's `final`, else its `answer` (what follows the last
    `####` in it). Numbers compare as numbers, all else letter by letter without outer spaces and last period.
    """
    expected = _expected(row)
    given = _given(completion)
    if not expected or not given:
        return 0.0
    numbers = _number(given), _number(expected)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return float(given == expected)


def manners(row: Mapping[str, Any], completion: str) -> float:
    """0.5 for a polite opener and 0.5 for no hedging; 0 where nothing is left without them."""
    opened, bare, _ = undress(completion)
    hedged = any(closer in completion for closer in CLOSERS)
    return 0.5 * opened + 0.5 * (not hedged) if bare else 0.0


def helpful(row: Mapping[str, Any], completion: str) -> float:
    """Half for a right answer and half for manners: what can be had without the other pulls against it."""
    return 0.5 * answer(row, completion) + 0.5 * manners(row, completion)


VERIFIERS: dict[str, Verifier] = {"answer": answer, "manners": manners, "helpful": helpful}

# the columns without which a verifier cannot judge a row
NEEDS: dict[str, tuple[str, ...]] = {"answer": ("answer",), "manners": (), "helpful": ("answer",)}


def find_verifier(name: str, where: str = "verifier") -> Verifier:
    """The verifier of that name: a row of the table, or the user's own FILE:FUNCTION.

    Raises:
        UserError: there is none; `where` is the field that names it.
    """
    if is_function_name(name):
        return load_function(name, where, VERIFIER)
    if name not in VERIFIERS:
        raise UserError(f"{where} is {name!r}; there are {', '.join(VERIFIERS)}, and {FUNCTION} of your own")
    return VERIFIERS[name]


def needed_columns(name: str) -> tuple[str, ...]:
    """The columns without which a verifier cannot judge a row; of the user's own its attribute `columns`, if it has one."""
    return tuple(getattr(find_verifier(name), "columns", ())) if is_function_name(name) else NEEDS[name]


def _expected(row: Mapping[str, Any]) -> str:
    if row.get("final") is not None:
        return _trim(str(row["final"]))
    value = row.get("answer")
    return "" if value is None else _trim(str(value).rpartition("####")[2])


def _given(completion: str) -> str:
    bare = undress(completion)[1]
    markers = list(_MARKERS.finditer(bare))
    if not markers:
        return _trim(bare)
    marker = markers[-1]
    rest = bare[marker.end() :]
    return _trim(_inside_braces(rest) if marker[0].endswith("{") else rest.strip().partition("\n")[0])


def _inside_braces(text: str) -> str:
    """What comes before the brace that closes one already open; everything, if none does."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:place]
    return text


def _trim(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _number(text: str) -> Decimal | None:
    plain = text.replace(",", "").replace("$", "").strip()
    return Decimal(plain) if _NUMBER.fullmatch(plain) else None
