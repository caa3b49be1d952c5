"""Rows that cannot be read or trained on, and the reasons under which they are counted."""

from __future__ import annotations

import contextlib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

from lm.config.field import shown
from lm.experiment import UserError

# Reasons by number, as the cache stores them; 0 means no reason. Append new reasons at the end.
REASONS = (
    "",
    "with an empty answer",
    "with equal answers",
    "with an empty text",
    "whose marks leave no turn to learn",
    "that are not valid JSON",
    "without the columns of this stage",
    "with turns that are no conversation",
    "with tools",
    "with reasoning beside the answer",
    "with content that is not text",
    "with a flag, margin or mark that cannot be read",
    "with answers to different prompts",
    "with other fields than the header of the file",
    "with a value that cannot be read",
    "with a system column that disagrees",
    "that the chat template refuses",
    "with chat_template_kwargs that cannot be read",
)
(
    WHOLE, EMPTY_ANSWER, EQUAL_ANSWERS, EMPTY_TEXT, UNMARKED, JSON, COLUMNS, TURNS, TOOLS, REASONING, CONTENT, FLAG, PROMPTS,
    FIELDS, VALUE, SYSTEM, TEMPLATE, VARIABLES,
) = range(len(REASONS))  # fmt: skip
ADVICE = "; bad_rows drop leaves such rows out, counted"


@dataclass(frozen=True)
class Column:
    """A column that every row must have, or several of which one is enough.

    `check(row)` raises UserError for a row whose values cannot be used.
    """

    names: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], object] = lambda row: None


# A column, or the name of one with any value, or a tuple of names of which one is enough.
ColumnNeed = str | tuple[str, ...] | Column


class BadRow(UserError):
    """Raised for a row that the stage cannot train on; `reason` is an index into REASONS."""

    def __init__(self, message: str, reason: int):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, int]]:
        """Makes the error picklable, so that it can cross process boundaries."""
        return BadRow, (str(self), self.reason)


@contextlib.contextmanager
def with_advice() -> Iterator[None]:
    """Context in which the message of a BadRow also says how to drop such rows."""
    try:
        yield
    except BadRow as error:
        raise BadRow(f"{error}{ADVICE}", error.reason) from error


def names_of_needs(needs: Sequence[ColumnNeed]) -> list[str]:
    """Every column that the needs name."""
    return [name for need in needs for name in _column(need).names]


def _column(need: ColumnNeed) -> Column:
    if isinstance(need, Column):
        return need
    return Column((need,) if isinstance(need, str) else need)


def check_columns(row: Mapping[str, Any], needs: Sequence[ColumnNeed], where: str, who: str = "the verifier") -> None:
    """Raises BadRow for a row that lacks a column that `who` needs (null and blank values count as missing), or has one of another type."""
    for column in map(_column, needs if not isinstance(row, Unreadable) else ()):
        if all(is_blank(row.get(name)) for name in column.names):
            raise missing_columns(row, where, f"{who} needs the column {' or '.join(column.names)}")
        try:
            column.check(row)
        except UserError as error:
            raise BadRow(f"{where}: {who} cannot read a column: {error}", VALUE) from error


def typed_column(names: str | tuple[str, ...], kind: Any) -> Column:
    """The column whose values have a type: `str`, `int`, `float`, `bool`, `dict`, `list[…]`, or a union of these."""
    names = (names,) if isinstance(names, str) else names
    return Column(names, functools.partial(_check_type, names, kind))


def _check_type(names: tuple[str, ...], kind: Any, row: Mapping[str, Any]) -> None:
    for name in names:
        if not is_blank(row.get(name)) and not has_type(row[name], kind):
            wanted = kind.__name__ if isinstance(kind, type) and not typing.get_origin(kind) else kind
            raise UserError(f"{name} is {shown(row[name])}; it should be of type {wanted}")


def is_type(kind: Any) -> bool:
    """Whether a value of Python is a type that `has_type` takes."""
    return kind is Any or isinstance(kind, type) or typing.get_origin(kind) is not None


def has_type(value: Any, kind: Any) -> bool:
    """Whether a row's value has a type; numbers are finite, a whole number is an int however it is stored, and a bool is none."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(has_type(value, one) for one in inside)
    if kind is list or origin is list:
        return isinstance(value, list | tuple) and all(has_type(item, one) for one in inside for item in value)
    if kind is dict or origin is dict:
        return isinstance(value, Mapping)
    if kind in (int, float):
        number: Any = value if isinstance(value, Number) and not isinstance(value, bool) else math.nan
        return isinstance(number, int) or (math.isfinite(number) and (kind is float or number == int(number)))
    return kind in (Any, object) or isinstance(value, kind)


def missing_columns(row: Mapping[str, Any], where: str, what: str) -> BadRow:
    """The error for a row without a column; `what` says who needs which."""
    found = ", ".join(str(name) for name, value in row.items() if value is not None) or "none"
    null = [str(name) for name, value in row.items() if value is None]
    empty = f" ({', '.join(null)} {'is' if len(null) == 1 else 'are'} null)" if null else ""
    return BadRow(f"{where}: {what}; the columns found are {found:.200}{empty:.100}", COLUMNS)


def is_blank(value: Any) -> bool:
    """Whether a value of a row is null, or a text of white space only."""
    return value is None or (isinstance(value, str) and not value.strip())


class Unreadable(dict[str, Any]):
    """Placeholder for a row that cannot be read, where bad rows are dropped."""

    def __init__(self, error: BadRow, raw: str):
        super().__init__()
        self.error, self.raw = error, raw
