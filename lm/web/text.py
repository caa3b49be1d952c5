"""Untrusted text (of models and data) made safe to show on a page and on a terminal."""

from __future__ import annotations

import re

BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+|\n(?:[ \t]*\n){3,}")


def visible(text: str) -> str:
    """Replace control characters by visible symbols (␀, ␛) and lone surrogates by U+FFFD.

    Newlines and tabs stay.
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text.replace("\r\n", "\n"))
    return re.sub(r"[\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)


def shown(text: str) -> str:
    """The text as `visible`; pure white space, and blank lines at the start or several in a row, as symbols: ⏎ newline, ␣ space, ⇥ tab."""
    found = visible(text)
    if not found.strip():
        return _symbols(found)
    return BLANK_LINES.sub(lambda lines: _symbols(lines[0]) + "\n", found)


def _symbols(white_space: str) -> str:
    return "".join({"\n": "⏎", "\t": "⇥"}.get(letter, "␣") for letter in white_space)


def beginning(text: str, characters: int, lines: int = 20) -> str:
    """The start of a text, at most so many lines and characters; the whole text if little would be cut."""
    short = text if len(text) <= 1.2 * characters else text[:characters]
    return "\n".join(short.split("\n")[:lines])
