"""Marks: private characters that are inserted into a conversation to find its texts in a template's output."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

from lm.data.hub.vocabulary import split_at

Turn = Mapping[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
TAG = r"</?[^<>\s]{1,60}>|\[/?[A-Z_]{1,40}\]"  # a template may look for it in a text: <think>, [/INST]
RUN = re.compile(rf"{TAG}|([^\s<\[]+|[<\[])")  # a tag, which is not split, or a run of letters, which gets a mark
PRIVATE = range(0xF0000, 0x10FFF0)

Amount = Literal["all messages", "all texts", "texts that are not empty", "the assistant's texts"]
AMOUNTS: tuple[Amount, ...] = get_args(Amount)
# White space alone, or behind a tag: the text behind the tag is white space alone for a template that splits there.
BLANK_END = re.compile(rf"(?:\A|{TAG})\s+\Z")
# Where in such white space the mark is: templates may strip it at both ends, at its start, or at its end.
BLANK_PLACES = (0.5, 1.0, 0.0)


@dataclass(frozen=True)
class TextMark:
    """A private character that occurs in one text of one message, `count` times."""

    letter: str
    turn: int
    part: str  # content, reasoning, or call
    count: int


def all_text(value: Any) -> str:
    """All texts in a nested value, joined by line ends."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    each_text(value, keep)
    return "\n".join(found)


def free_letters(text: str = "") -> Iterator[str]:
    """Private characters that do not occur in the text."""
    taken = set(text)
    return (chr(code) for code in PRIVATE if chr(code) not in taken)


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A nested value with a function applied to every text in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: each_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [each_text(item, change) for item in value]
    return value


def blank_places(messages: Sequence[Turn]) -> tuple[float, ...]:
    """The places of marks to try: more than one if a message is white space alone, or ends with it behind a tag."""
    texts = [turn.get("content") for turn in messages]
    return BLANK_PLACES if any(isinstance(one, str) and BLANK_END.search(one) for one in texts) else BLANK_PLACES[:1]


def mark(
    messages: Sequence[Turn], letters: Iterator[str], amount: Amount = "all texts", blank: float = BLANK_PLACES[0]
) -> tuple[list[Turn], list[TextMark]]:
    """The messages with marks in their texts, and the marks.

    A text is marked at every run of letters and at its end, so that even a part of it shows where it begins and
    ends. The conditions that templates test (is a text empty, does it begin with a tag, its content without outer white
    space) should have the same results; the output, which must be equal apart from the marks, proves it.

    Args:
        amount: which texts get marks; "all messages": also the empty content of calls, which "all texts" does not.
        blank: where the mark of white space alone, or behind a last tag, is, as a fraction of its length.
    """
    marked, marks = [], []
    for number, turn in enumerate(messages):
        assistant = turn.get("role") == "assistant"
        if not assistant and amount == "the assistant's texts":
            marked.append(turn)
            continue

        def put(text: str, part: str, at_end: bool = True, number: int = number) -> str:
            letter = next(letters)
            changed = _with_marks(text, letter, at_end, blank)
            marks.append(TextMark(letter, number, part, changed.count(letter)))
            return changed

        changed = dict(turn)
        for key in REASONING:
            if isinstance(turn.get(key), str) and turn[key].strip():
                changed[key] = put(turn[key], "reasoning")
        calls = [_marked_call(call, lambda name: put(name, "call", False)) for call in turn.get("tool_calls") or ()]
        if calls:
            changed["tool_calls"] = calls
        content = turn.get("content")
        if isinstance(content, str) and content:
            changed["content"] = put(content, "content")
        elif isinstance(content, list):
            changed["content"] = [_marked_part(part, lambda text: put(text, "content")) for part in content]
        elif not content and "content" in turn and (amount == "all messages" or (amount == "all texts" and not calls)):
            changed["content"] = put("", "content")
        marked.append(changed)
    return marked, marks


def _with_marks(text: str, letter: str, at_end: bool, blank: float) -> str:
    end = len(text.rstrip())
    if not at_end and end:
        return letter + text
    last = end + int(blank * (len(text) - end)) if BLANK_END.search(text) else end
    runs = [found.start() for found in RUN.finditer(text, 0, end) if found.group(1)]
    pieces = [text[a:b] for a, b in zip([0, *runs], [*runs, last], strict=True)]
    return letter.join(pieces) + letter + text[last:]


def _marked_call(call: Any, put: Callable[[str], str]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _marked_call(call["function"], put)}
    return {**call, "name": put(call["name"])} if isinstance(call.get("name"), str) else call


def _marked_part(part: Any, put: Callable[[str], str]) -> Any:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return {**part, "text": put(part["text"])}
    return part


def places(text: str, letters: set[str]) -> tuple[str, dict[str, list[int]]]:
    """The text without the marks, and the positions in it of each mark."""
    found: dict[str, list[int]] = {letter: [] for letter in letters}
    pieces = split_at(text, letters)
    at = 0
    for piece, is_mark in pieces:
        if is_mark:
            found[piece].append(at)
        else:
            at += len(piece)
    return "".join(piece for piece, is_mark in pieces if not is_mark), found


@dataclass(frozen=True)
class Shields:
    """Private characters that replace typed control tokens while a template renders."""

    letters: Mapping[str, str]  # by the token's name

    @classmethod
    def of(cls, names: Sequence[str], letters: Iterator[str]) -> Shields:
        """A shield for each name."""
        return cls(dict(zip(names, islice(letters, len(names)), strict=True)))

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The names by their shields."""
        return {letter: name for name, letter in self.letters.items()}

    def only(self, names: Collection[str]) -> Shields:
        """The shields of these names only."""
        return Shields({name: letter for name, letter in self.letters.items() if name in names})

    def put(self, value: Any) -> Any:
        """The value with every name in its texts replaced by its shield."""
        return each_text(value, lambda text: _exchanged(text, self.letters))

    def remove(self, text: str) -> str:
        """The text with every shield replaced by its name again."""
        return _exchanged(text, self.names)


def _exchanged(text: str, table: Mapping[str, str]) -> str:
    return "".join(table[piece] if found else piece for piece, found in split_at(text, table))
