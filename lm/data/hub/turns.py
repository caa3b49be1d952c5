"""Finds the assistant's text in a conversation rendered by a model's chat template.

A template with generation blocks marks it. With other templates the conversation is rendered a second time with a
mark at every run of letters of every text: apart from the marks both outputs must be equal, and the marks then show where
each message is. A turn begins after its header, the text between the message before and the assistant's (the generation
prompt). It ends with the end token, the first control token that the template writes after an answer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.data.hub import marks as marking
from lm.data.hub.marks import AMOUNTS, TextMark, blank_places
from lm.data.hub.sandbox import BLOCK_MARKS, GENERATION_END, GENERATION_START
from lm.data.hub.template import ChatTemplate, TemplateError, Turn
from lm.data.hub.vocabulary import split_at
from lm.data.text_tokenizer import LEFT_OUT

PARTS = {"reasoning": LEFT_OUT[5], "call": LEFT_OUT[6]}
OTHERS, PARTLY, NO_BLOCK, NO_DEFINITIONS, QUOTED = LEFT_OUT[4], *LEFT_OUT[7:]
SHOWN = 30  # characters around a place in an error
ASKED, ANSWERED = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the assistant's message `turn`; its end token begins at `text_end`."""

    start: int
    text_end: int
    end: int
    turn: int


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: its text, the spans of the assistant's messages, and what the template left out."""

    text: str
    spans: tuple[Span, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marked:
    """The output of a marked conversation with the marks removed, and their positions in it."""

    text: str
    marks: Sequence[TextMark]
    places: Mapping[str, Sequence[int]]

    def extent(self, turn: int, parts: Collection[str] = ("content", "reasoning", "call")) -> tuple[int, int] | None:
        """The first and last position of a message's marks; None if the template left the message out."""
        found = [
            place for one in self.marks if one.turn == turn and one.part in parts for place in self.places[one.letter]
        ]
        return (min(found), max(found)) if found else None


@dataclass(frozen=True)
class Reader:
    """Renders conversations with one template and finds their turns; `tokens` are the names of the added tokens."""

    template: ChatTemplate
    tokens: Collection[str]
    _ends: dict[str, frozenset[str]] = field(default_factory=dict)
    _headers: dict[str, str] = field(default_factory=dict)

    def read(
        self,
        messages: Sequence[Turn],
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any],
        letters: Iterator[str],
        output: str,
    ) -> Conversation:
        """The conversation that the template rendered to `output`, with the spans of the assistant's messages.

        Raises:
            TemplateError: the template refuses it, or the assistant's text cannot be located (names the place).
        """
        if not messages:
            raise TemplateError(f"{self.template.where}: a conversation needs at least one message")
        if output.count(GENERATION_START) != output.count(GENERATION_END):
            raise TemplateError(f"{self.template.where}: the template cuts the output of its generation blocks")
        text, blocks = without_blocks(output)
        answers = [number for number, turn in enumerate(messages) if turn.get("role") == "assistant"]
        derives = bool(answers) and not self.template.marks_generation
        marked = self._marked(messages, tools, variables, letters, text, derives)
        left_out = _left_out(messages, marked) if marked else set()
        left_out |= self._tools_left_out(messages, tools, variables, output, False)
        if derives and marked:
            spans = list(self._spans(messages, tools, variables, letters, marked))
        else:
            spans = [self._block(answers, text, marked, block, number) for number, block in enumerate(blocks)]
            left_out |= {NO_BLOCK} if set(answers) - {one.turn for one in spans} else set()
        return Conversation(text, tuple(spans), tuple(name for name in LEFT_OUT if name in left_out))

    def left_out(
        self,
        messages: Sequence[Turn],
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any],
        letters: Iterator[str],
        text: str,
    ) -> tuple[str, ...]:
        """The parts that the template leaves out of a conversation; `text` is its output with the generation prompt."""
        if len(messages) < 2 and not tools:
            return ()
        marked = self._marked(messages, tools, variables, letters, text, False, prompt=True)
        found = _left_out(messages, marked) if marked else set()
        found |= self._tools_left_out(messages, tools, variables, text, True)
        return tuple(name for name in LEFT_OUT if name in found)

    def _tools_left_out(
        self, messages: Sequence[Turn], tools: Any, variables: Mapping[str, Any], output: str, prompt: bool
    ) -> set[str]:
        """Whether the output lacks the definitions of tools, or quotes the arguments of calls a second time."""
        found = set()
        try:
            if (
                tools
                and without_blocks(self.template.render(messages, None, prompt, variables))[0]
                == without_blocks(output)[0]
            ):
                found.add(NO_DEFINITIONS)
        except TemplateError:  # the template needs the tools
            pass
        calls = [call.get("function", call) for turn in messages for call in turn.get("tool_calls") or ()]
        texts = [call["arguments"] for call in calls if isinstance(call.get("arguments"), str)]
        if any(text not in output and json.dumps(text, ensure_ascii=False) in output for text in texts):
            found.add(QUOTED)
        return found

    def _marked(
        self, messages: Sequence[Turn], tools: Any, variables: Mapping[str, Any], letters: Iterator[str], text: str,
        needed: bool, prompt: bool = False,
    ) -> Marked | None:  # fmt: skip
        """The conversation with marks in all texts that the template renders unchanged."""
        found = None
        amounts = (
            AMOUNTS if any(turn.get("tool_calls") and not turn.get("content") for turn in messages) else AMOUNTS[1:]
        )
        for blank, amount in itertools.product(blank_places(messages), amounts):
            changed, marks = marking.mark(messages, letters, amount, blank)
            try:
                found = _marks_of(self.template.render(changed, tools, prompt, variables), marks)
            except TemplateError:
                continue
            if found.text == text:
                return found
        if not needed:
            return None
        where = self.template.where
        if found is None:
            raise TemplateError(
                f"{where}: the template refuses the conversation with marks in its texts; give it generation blocks"
            )
        at = next(
            (i for i, (a, b) in enumerate(zip(text, found.text, strict=False)) if a != b),
            min(len(text), len(found.text)),
        )
        raise TemplateError(
            f"{where}: the assistant's text cannot be located: the template changes texts near "
            f"{text[max(0, at - SHOWN) : at + SHOWN]!r}; give it generation blocks"
        )

    def _spans(
        self, messages: Sequence[Turn], tools: Any, variables: Mapping[str, Any], letters: Iterator[str], marked: Marked
    ) -> Iterator[Span]:
        text, ends = marked.text, self._end_tokens(letters)
        order = sorted(
            (extent, number) for number in range(len(messages)) if (extent := marked.extent(number)) is not None
        )
        for place, ((first, last), number) in enumerate(order):
            if messages[number].get("role") != "assistant":
                continue
            for one in marked.marks:
                if one.turn == number and len(marked.places[one.letter]) > one.count:
                    raise self._unclear(number, "the template writes it more than once", text, first)
            before = order[place - 1] if place else None
            limit = order[place + 1][0][0] if place + 1 < len(order) else len(text)
            start = self._start(messages, tools, variables, letters, marked, number, before)
            if start is None or start > first:
                raise self._unclear(number, "the end of its header is not found", text, first)
            hidden = number - (order[place - 1][1] if place else -1) > 1
            if hidden and any(_named(text, ends, start, first)):
                raise self._unclear(number, "a message without text ends between it and its header", text, first)
            end = next(_named(text, ends, last, limit), None)
            if end is None:
                raise self._unclear(number, f"no end token ({' or '.join(sorted(ends))}) follows it", text, last)
            yield Span(start, end[0], end[1], number)

    def _start(
        self, messages: Sequence[Turn], tools: Any, variables: Mapping[str, Any], letters: Iterator[str], marked: Marked,
        number: int, before: tuple[tuple[int, int], int] | None,
    ) -> int | None:  # fmt: skip
        """Position of the end of an assistant message's header."""
        first = marked.extent(number)
        at = 0
        if before is not None:
            (_, at), previous = before
            turn = messages[previous]
            key = f"{turn.get('role')} {bool(tools)} {bool(turn.get('tool_calls'))}"
            for again in (False, True):
                if again or key not in self._headers:
                    # Without template variables: a thinking block that they add to the prompt belongs to the answer.
                    self._headers[key] = self._prompt_behind(messages[: previous + 1], tools, letters).lstrip()
                found = self._behind(marked.text, at, self._headers[key])
                if found is not None:
                    return found
        # The text here depends on the message after it, or there is no message before: found by its tokens instead.
        header = self._prompt_behind([ASKED], None, letters)
        edges = [0, *itertools.accumulate(len(piece) for piece, _ in split_at(header, self.tokens))]
        for edge in [len(header) - len(header.lstrip()), *edges[1:-1]]:
            place = marked.text.find(header[edge:], at, first[0]) if first and header[edge:].strip() else -1
            if place >= 0:
                return place + len(header) - edge
        return None

    def _prompt_behind(self, messages: Sequence[Turn], tools: Any, letters: Iterator[str]) -> str:
        """The text after the last message, including the generation prompt; empty if the template refuses."""
        changed, marks = marking.mark(messages, letters)
        try:
            shown = _marks_of(self.template.render(changed, tools, generation_prompt=True), marks)
        except TemplateError:
            return ""
        extent = shown.extent(len(messages) - 1)
        return shown.text[extent[1] :] if extent else ""

    def _behind(self, text: str, at: int, header: str) -> int | None:
        """Position after the header in the text from `at`, or after as many whole tokens of it as the text has."""
        begin = at + len(text[at:]) - len(text[at:].lstrip())
        if header and text.startswith(header, begin):
            return begin + len(header)
        same = next((i for i, (a, b) in enumerate(zip(text[begin:], header, strict=False)) if a != b), 0)
        edge, whole = 0, 0
        for piece, is_token in split_at(header, self.tokens):
            if edge + len(piece) > same:
                whole = edge if is_token else 0
                break
            edge += len(piece)
        return begin + whole if whole else None

    def _end_tokens(self, letters: Iterator[str]) -> frozenset[str]:
        """The tokens that end an answer, in the last turn or in an earlier one."""
        if "plain" not in self._ends:
            found: set[str] = set()
            for messages in ([ASKED, ANSWERED, ASKED, ANSWERED], [ASKED, ANSWERED]):
                changed, marks = marking.mark(messages, letters)
                try:
                    shown = _marks_of(self.template.render(changed), marks)
                except TemplateError:
                    continue
                for number in range(1, len(messages), 2):
                    extent = shown.extent(number)
                    behind = next(_named(shown.text, self.tokens, extent[1], len(shown.text)), None) if extent else None
                    found |= {shown.text[slice(*behind)]} if behind else set()
            if not found:
                raise TemplateError(
                    f"{self.template.where}: the template ends an assistant's turn without a token of the tokenizer, so "
                    "that a model would not learn to end its turn; give it generation blocks"
                )
            self._ends["plain"] = frozenset(found)
        return self._ends["plain"]

    def end_tokens(self) -> frozenset[str]:
        """The tokens that end an answer; none if the template's output does not show them."""
        try:
            return self._end_tokens(marking.free_letters())
        except TemplateError:
            return frozenset()

    def _block(
        self, answers: Sequence[int], text: str, marked: Marked | None, block: tuple[int, int], number: int
    ) -> Span:
        """A generation block as the span of the assistant message whose marks it contains, else of the next one."""
        start, end = block
        extents = {answer: extent for answer in answers if marked and (extent := marked.extent(answer))}
        inside = [answer for answer, (first, last) in extents.items() if first < end and start <= last]
        before = [answer for answer, (first, _) in extents.items() if first < end]
        turn = (inside or before or [answers[min(number, len(answers) - 1)]])[-1] if answers else 0
        *_, token = None, *_named(text, self.tokens, start, end)
        return Span(start, token[0] if token and not text[token[1] : end].strip() else end, end, turn)

    def _unclear(self, number: int, why: str, text: str, at: int) -> TemplateError:
        near = text[max(0, at - SHOWN) : at + SHOWN]
        return TemplateError(
            f"{self.template.where}: turn {number + 1}: the assistant's text cannot be located near {near!r}: {why}"
        )


def without_blocks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of generation blocks, and the blocks' positions in it."""
    plain, found = marking.places(text, set(BLOCK_MARKS))
    return plain, list(zip(found[GENERATION_START], found[GENERATION_END], strict=False))


def _marks_of(text: str, marks: Sequence[TextMark]) -> Marked:
    plain, found = marking.places(text, {*BLOCK_MARKS, *(one.letter for one in marks)})
    return Marked(plain, marks, found)


def _left_out(messages: Sequence[Turn], marked: Marked) -> set[str]:
    """The parts of the messages that are missing from the output, wholly or in part."""
    found = set()
    for one in marked.marks:
        left, turn = len(marked.places[one.letter]), messages[one.turn]
        if left >= one.count or (one.part == "content" and not str(turn.get("content") or "").strip()):
            continue
        whole = f"{turn.get('role')} messages" if one.part == "content" else PARTS[one.part]
        found.add(PARTLY if left else whole if whole in LEFT_OUT else OTHERS)
    return found


def _named(text: str, names: Collection[str], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The positions (begin, end) of the names in text[start:stop]."""
    at = start
    for piece, is_name in split_at(text[start:stop], names):
        if is_name:
            yield at, at + len(piece)
        at += len(piece)
