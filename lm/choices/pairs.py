"""Pairs to compare: built from rows with a prompt and its answers, each keyed by its content."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm.choices.log import is_turns
from lm.data import chat
from lm.data.layouts import canonical
from lm.data.sources import Rows
from lm.experiment import UserError

Turns = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """An answer (a text, or turns of a conversation) and its source (None: unknown)."""

    answer: Turns
    source: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two different answers to one prompt. `key` depends only on their texts, not on their order or place."""

    key: str
    prompt: Turns
    first: Answer
    second: Answer


@dataclass(frozen=True)
class LabelTask:
    """All pairs in row order, and remarks on rows left out or unusual."""

    pairs: tuple[Pair, ...]
    remarks: tuple[str, ...]


def make_task(rows: Rows) -> LabelTask:
    """Build the pairs of rows with `prompt` and `answers`, and optionally `sources` (a name for each answer).

    All answers of a row are compared with each other; where they have two sources or more, only across sources.
    Equal answers make no pair, and a repeated pair is taken once.

    Raises:
        UserError: a row without the columns or with an invalid prompt or answer; no pair at all.
    """
    pairs: dict[str, Pair] = {}
    equal = again = empty = 0
    for index in range(len(rows)):
        prompt, answers = _checked(rows[index], rows.where(index))
        empty += sum(not text_of(answer.answer).strip() for answer in answers)
        for first, second in _compared(answers):
            if text_of(first.answer).strip() == text_of(second.answer).strip():
                equal += 1
                continue
            key = pair_key(prompt, first.answer, second.answer)
            again += key in pairs
            pairs.setdefault(key, Pair(key, prompt, first, second))
    if not pairs:
        why = f"all {equal} have two equal answers" if equal else "there are no rows"
        raise UserError(f"{rows.path} has no pair to compare: {why}")
    counted = (
        (equal, "of equal answers left out"),
        (again, "repeated, taken once"),
    )
    remarks = [f"{rows.path}: {_plural(count, 'pair')} {what}" for count, what in counted if count]
    if empty:
        remarks.append(f"{rows.path}: {_plural(empty, 'answer')} without text, shown as empty")
    return LabelTask(tuple(pairs.values()), tuple(remarks))


def pair_key(prompt: Turns, *answers: Turns) -> str:
    """16 hexadecimal digits of the hash of a prompt and two answers, in either order."""
    parts = [_canonical(prompt), *sorted(map(_canonical, answers))]
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()[:16]


def text_of(turns: Turns) -> str:
    """The text of an answer or prompt; several turns are joined."""
    return turns if isinstance(turns, str) else "\n\n".join(turn["content"] for turn in turns)


def shuffled(pairs: Iterable[Pair], seed: int) -> list[Pair]:
    """Shuffle pairs by a hash of the seed and their contents."""
    return sorted(pairs, key=lambda pair: _hash(f"{seed} {pair.key}"))


def on_the_left(pair: Pair, annotator: str, seed: int) -> bool:
    """Whether this annotator sees the pair's first answer on the left: a fair, deterministic coin."""
    return _hash(f"{seed} {pair.key} {annotator}")[0] % 2 == 0


def _compared(answers: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    contest = len({answer.source for answer in answers}) > 1
    for first, second in itertools.combinations(answers, 2):
        if not contest or first.source != second.source:
            yield first, second


def _checked(row: Mapping[str, Any], where: str) -> tuple[Turns, list[Answer]]:
    """Validate a row: its prompt and answers, any two of which can become a preference row."""
    missing = [column for column in ("prompt", "answers") if row.get(column) is None]
    if missing:
        found = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where}: needs the columns prompt and answers; the columns found are {found:.200}")
    chat.refuse_tools(row, where)
    prompt, answers, sources = row["prompt"], row["answers"], row.get("sources")
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError(f"{where}: answers must be a list of two or more, found {answers!r:.60}")
    if sources is None:
        sources = [None] * len(answers)
    elif not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UserError(f"{where}: sources must be a list of names, found {sources!r:.60}")
    elif len(sources) != len(answers):
        raise UserError(f"{where}: {len(sources)} sources for {len(answers)} answers; each answer needs its own")
    for answer in answers:
        chat.preference_messages({"prompt": prompt, "chosen": answer, "rejected": answers[0]}, f"{where}, answers")
    plain = [canonical({"prompt": prompt, "chosen": answer})["chosen"] for answer in answers]
    asked = prompt if isinstance(prompt, str) else chat.prompt_messages({"prompt": prompt}, where)
    for column, value in (("prompt", asked), *(("answers", answer) for answer in plain)):
        if not is_turns(value):
            raise UserError(f"{where}: {column} must be text, or turns with role and content, found {value!r:.60}")
    return asked, [Answer(answer, source) for answer, source in zip(plain, sources, strict=True)]


def _canonical(turns: Turns) -> str:
    return json.dumps(turns, ensure_ascii=False, sort_keys=True)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
