"""JSON as files have it: what is nested deeper than any example, and integers without end, do not stand in the way."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

DEEPEST = 100  # what is nested deeper is left out: no column that stages read is so deep
LONGEST = 4_000  # digits of an integer; of a longer one the text is taken
MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def loads(text: str, deepest: int = DEEPEST) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, and for a key that stands twice in one object."""
    if text.count("{") + text.count("[") > deepest:
        text = cut_at_depth(text, deepest)
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return json.loads(
            text, object_pairs_hook=_object, parse_int=lambda digits: int(digits) if len(digits) < LONGEST else digits
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.40} stands twice in one object")
    return made


def cut_at_depth(text: str, depth: int) -> str:
    """The JSON with `null` for what lies deeper."""
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
