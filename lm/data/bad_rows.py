"""Rows that cannot be read, and rows that nothing can be learned from: why, in the words under which they are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lm.experiment import UserError

# Reasons by number, as the cache keeps them; 0 is none. A new one goes to the end.
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
)
(
    WHOLE, EMPTY_ANSWER, EQUAL_ANSWERS, EMPTY_TEXT, UNMARKED, JSON, COLUMNS, TURNS, TOOLS, REASONING, CONTENT, FLAG, PROMPTS,
    FIELDS, VALUE, SYSTEM,
) = range(len(REASONS))  # fmt: skip
ADVICE = "; bad_rows drop leaves such rows out, counted"


def one_line(text: str) -> str:
    """The text with control characters, line ends among them, written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class BadRow(UserError):
    """A row that is no example of the stage; `reason` is the number of one of REASONS."""

    def __init__(self, message: str, reason: int):
        super().__init__(one_line(message))
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, int]]:
        """For other processes."""
        return BadRow, (str(self), self.reason)


@contextlib.contextmanager
def with_advice() -> Iterator[None]:
    """Inside, a bad row of a source is told with what leaves it out."""
    try:
        yield
    except BadRow as error:
        raise BadRow(f"{error}{ADVICE}", error.reason) from error


class Unreadable(dict[str, Any]):
    """In place of a row that a file has and that cannot be read, where such rows are to be dropped."""

    def __init__(self, error: BadRow, raw: str):
        super().__init__()
        self.error, self.raw = error, raw
