"""Rows that cannot be read or trained on, and the reasons under which they are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


# A column that every row must have, or a tuple of columns of which one is enough.
ColumnNeed = str | tuple[str, ...]


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
    return [name for need in needs for name in ((need,) if isinstance(need, str) else need)]


def check_columns(row: Mapping[str, Any], needs: Sequence[ColumnNeed], where: str, who: str = "the verifier") -> None:
    """Raises BadRow for a row that lacks a column that `who` needs; null and blank values count as missing."""
    for need in needs if not isinstance(row, Unreadable) else ():
        names = names_of_needs([need])
        if all(is_blank(row.get(name)) for name in names):
            raise missing_columns(row, where, f"{who} needs the column {' or '.join(names)}")


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
