"""JSON of data files: tolerates very deep nesting and very long integers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

DEEPEST = 100  # maximum nesting depth; deeper values are left out, since no column that a stage reads is so deep
LONGEST = 4_000  # digits of an integer; a longer one is kept as text
MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)

Twice = dict[int, tuple[dict[str, Any], str]]  # id of an object → (object, a key that it has twice)


def loads(text: str, twice: Twice | None = None, deepest: int = DEEPEST) -> Any:
    """Parse a JSON text. Raises ValueError for invalid JSON.

    Args:
        twice: receives the objects that have a key twice.
    """
    if text.count("{") + text.count("[") > deepest:
        text = cut_at_depth(text, deepest)

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if twice is not None and len(value) < len(pairs):
            twice[id(value)] = value, Counter(name for name, _ in pairs).most_common(1)[0][0]
        return value

    try:
        return json.loads(text, object_pairs_hook=made)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        shortened: dict[str, Any] = {"parse_int": lambda digits: int(digits) if len(digits) < LONGEST else digits}
        return json.loads(text, object_pairs_hook=made, **shortened)


def key_twice(row: Mapping[str, Any], twice: Twice, columns: Container[str]) -> str | None:
    """A key that appears twice in the parts of a row that are read: its `columns`, or a turn of one of them."""
    if not twice:
        return None
    if id(row) in twice and twice[id(row)][1] in columns:
        return twice[id(row)][1]
    read = [value for name, value in row.items() if name in columns]
    turns = [turn for value in read for turn in (value if isinstance(value, list) else [value])]
    return next((twice[id(turn)][1] for turn in turns if id(turn) in twice), None)


def cut_at_depth(text: str, depth: int) -> str:
    """The JSON text with `null` in place of values nested deeper than `depth`."""
    kept, at, here = [], 0, 0
    for mark in MARK.finditer(text):
        if mark[0] in "[{":
            here += 1
            if here == depth:
                kept.append(text[at : mark.start()])
        elif mark[0] in "]}":
            if here == depth:
                kept.append("null")
                at = mark.end()
            here -= 1
    return "".join(kept) + text[at:] if here <= 0 else text
