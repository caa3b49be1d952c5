"""The held-out examples of an eval: read, checked and encoded before training starts and again at measurement.

An eval uses the first `count` held-out rows that can be measured. Rows that cannot be (too long, empty, tied, duplicates)
are skipped and counted; a row that is broken or lacks a column is an error, or is counted too where
the source says `bad_rows drop`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.bad_rows import (
    ADVICE,
    EMPTY_ANSWER,
    EMPTY_TEXT,
    REASONS,
    UNMARKED,
    BadRow,
    Unreadable,
    check_columns,
    missing_columns,
    names_of_needs,
)
from lm.data.chat import is_tie, render, said_by, tools_of, training_messages, variables_of
from lm.data.prompts import render_prompt
from lm.data.selection import heldout_rows
from lm.data.text_tokenizer import TextTokenizer
from lm.data.tokens import left_out, store_in_memory
from lm.evals.choices import read_choices
from lm.evals.core import core_items, read_core
from lm.evals.rows import Row
from lm.experiment import Eval, Experiment, UserError
from lm.rollout.episodes import EnvironmentSpec, environment_spec

LOOKED_AT = 100  # rows that decide whether a file has documents or conversations
BYTES_A_TOKEN = 8  # limit on the bytes of a document encoded per row of tokens
REPEATED = "with a prompt that another has"


@dataclass(frozen=True)
class Examples:
    """Examples to measure: `rows` as in the file, `encoded` as the metric reads them.

    encoded: token ids of prompts; one (tokens, mask) row of documents and conversations; two of pairs. `left_out` counts skipped rows
    by reason; `cut` counts left-truncated pairs; `texts` has the bytes that bits per byte divide by.
    """

    unit: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    encoded: list[Any] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    cut: int = 0

    @property
    def documents(self) -> bool:
        return self.unit == DOCUMENTS

    def describe(self, item: Eval) -> str:
        """One line: examples measured, examples requested, and rows skipped by reason."""
        count = len(self.encoded)
        asked = f"{count} of {item.count}" if count < item.count else f"{count}"
        line = f"evals.{item.name}: {item.source.path}: {asked} held-out {self.unit}"
        line += ", there are no more" if count < item.count else ""
        if self.left_out:
            line += f"; skipped: {', '.join(f'{number} {why}' for why, number in self.left_out.items())}"
        return line + (f"; {self.cut} left-truncated" if self.cut else "")


def read_examples(item: Eval, tokenizer: TextTokenizer, max_len: int, talks: Collection[str] = ()) -> Examples:
    """Read the examples of an eval for a model with a context of `max_len` tokens.

    Args:
        talks: paths of sources trained on as conversations even where their rows also have a `text` (`talks_of`).

    Raises:
        UserError: a row is broken or lacks a column (names it), or no row can be measured (says why).
    """
    found = READERS[item.metric](item, tokenizer, max_len, item.source.path in talks)
    if not found.encoded:
        reasons = ", ".join(f"{number} {why}" for why, number in found.left_out.items())
        raise UserError(
            f"evals.{item.name}: {item.source.path}: none of the held-out {found.unit} can be measured: {reasons}"
        )
    return found


def talks_of(experiment: Experiment) -> frozenset[str]:
    """Paths of sources that stages train on as conversations, prompts or pairs, and that none trains on as documents."""
    read = {True: set[str](), False: set[str]()}
    for stage in experiment.stages:
        read[stage.objective.data == "text"] |= {source.path for source in stage.sources}
    return frozenset(read[False] - read[True])


def _bits(item: Eval, tokenizer: TextTokenizer, max_len: int, talks: bool) -> Examples:
    """Examples of bits_per_byte: windows of documents where rows have a `text`, else (or for `talks`) conversations."""
    looked_at = itertools.islice(heldout_rows(item.source), LOOKED_AT)
    documents = not talks and any(isinstance(row.get("text"), str) for row, _ in looked_at)
    return (_documents if documents else _conversations)(item, tokenizer, max_len)


def _documents(item: Eval, tokenizer: TextTokenizer, max_len: int) -> Examples:
    """At least `count` windows of documents; the last document may be truncated."""
    found, (start, end) = Examples(DOCUMENTS), tokenizer.document_ids

    def add(row: dict[str, Any], where: str) -> str:
        if isinstance(row, Unreadable):
            raise row.error
        text = row.get("text")
        if not isinstance(text, str):
            raise missing_columns(row, where, "bits per byte need the column text")
        most = (item.count - len(found.encoded)) * max_len * BYTES_A_TOKEN
        data = text.encode(errors="replace")[:most].decode(errors="ignore")
        if not data.strip():
            return REASONS[EMPTY_TEXT]
        found.encoded.extend(windows([start, *tokenizer.encode(data), end], max_len))
        found.texts.append(data.encode(errors="replace"))
        return ""

    return _filled(item, found, add)


def _conversations(item: Eval, tokenizer: TextTokenizer, max_len: int) -> Examples:
    """Conversations that fit in the context, with the loss mask of their answers."""
    found, seen = Examples("conversations"), set[tuple[int, ...]]()

    def add(row: dict[str, Any], where: str) -> str:
        messages = training_messages(row, where)
        tools, variables = tools_of(row, where), variables_of(row, where)
        tokens, mask = render(messages, tokenizer, where=where, tools=tools, variables=variables)[:2]
        answers = [said_by(turn) for turn in messages if turn["role"] == "assistant" and turn.get("train", True)]
        if not answers:
            return REASONS[UNMARKED]
        if not any(answer.strip() for answer in answers):
            return REASONS[EMPTY_ANSWER]
        if len(tokens) > max_len:
            return f"longer than the {max_len} tokens of model.max_len"
        if tuple(tokens) in seen:
            return "that are duplicates"
        seen.add(tuple(tokens))
        found.encoded.append((tokens, mask))
        found.texts.extend(answer.encode(errors="replace") for answer in answers)
        return ""

    return _filled(item, found, add)


def _prompts(item: Eval, tokenizer: TextTokenizer, max_len: int, talks: bool) -> Examples:
    """Distinct prompts that leave room for an answer, of rows with the columns that the verifier needs."""
    found, seen = Examples("prompts"), set[tuple[Any, ...]]()
    room, spec = max_len - item.max_new_tokens, spec_of(item)

    def add(row: dict[str, Any], where: str) -> str:
        check_columns(
            row, spec.columns, where, f"the verifier {item.verifier}" if not item.environment else "the environment"
        )
        tokens = render_prompt(spec.messages, row, tokenizer, where).tokens
        if len(tokens) > room:
            return f"longer than {room} tokens (model.max_len {max_len} less max_new_tokens {item.max_new_tokens})"
        # The tasks of an environment may differ in more than their first messages.
        key = (*tokens, *(str(row.get(name)) for name in names_of_needs(spec.columns) if item.environment))
        if key in seen:
            return REPEATED
        seen.add(key)
        found.rows.append(row)
        found.encoded.append(tokens)
        return ""

    return _filled(item, found, add)


def spec_of(item: Eval) -> EnvironmentSpec:
    """The environment (or verifier) of an eval that samples answers."""
    where = f"evals.{item.name}"
    return environment_spec((item.verifier,), item.environment, where, where, item.reward_seconds, item.max_turns)


def _pairs(item: Eval, tokenizer: TextTokenizer, max_len: int, talks: bool) -> Examples:
    """Distinct pairs without ties of which some of both answers fits in the context."""
    found, seen = Examples("pairs"), set[tuple[tuple[int, ...], ...]]()
    cut = 0

    def add(row: dict[str, Any], where: str) -> str:
        nonlocal cut
        pair = encode_pair(row, where, tokenizer, max_len)
        if isinstance(pair, str):
            return pair
        sides, shortened = pair
        key = tuple(tuple(tokens) for tokens, _ in sides)
        if key in seen:
            return "that are duplicates"
        seen.add(key)
        cut += shortened
        found.rows.append(row)
        found.encoded.append(sides)
        return ""

    _filled(item, found, add)
    return Examples(found.unit, found.rows, found.encoded, found.texts, found.left_out, cut)


def _choices(item: Eval, tokenizer: TextTokenizer, max_len: int, talks: bool) -> Examples:
    """Distinct rows of choices whose texts all fit in the context."""
    found, seen = Examples("questions"), set[str]()

    def add(row: dict[str, Any], where: str) -> str:
        if isinstance(row, Unreadable):
            raise row.error
        choices = read_choices(row, where, item, tokenizer)
        if max(len(one.context) + len(one.tokens) - 1 for one in choices.tokens) > max_len:
            return f"longer than the {max_len} tokens of model.max_len"
        if (key := repr(choices.tokens)) in seen:
            return "that are duplicates"
        seen.add(key)
        found.rows.append(row)
        found.encoded.append(choices)
        return ""

    return _filled(item, found, add)


def _core(item: Eval, tokenizer: TextTokenizer, max_len: int, talks: bool) -> Examples:
    """The first `count` items of each task of a folder for the CORE score."""
    tasks = read_core(Path(item.source.path).expanduser())
    encoded = [one for task in tasks for one in core_items(task, tokenizer, max_len, item.count)]
    return Examples(f"items of {len(tasks)} tasks", encoded=encoded)


def encode_pair(
    row: Mapping[str, Any], where: str, tokenizer: TextTokenizer, max_len: int
) -> tuple[list[Row], bool] | str:
    """Encode both sides of a pair, left-truncated as in preference stages, and whether they were; or why it is skipped."""
    if is_tie(row, where):
        return TIED
    store = store_in_memory([(dict(row), where)], "pairs", tokenizer)
    both = np.arange(2)
    if why := next((why for why, those in left_out(store, both[None], max_len).items() if those.any()), ""):
        return why.replace("seq_len", "model.max_len")
    sides = [(side.tokens.tolist(), side.mask.tolist()) for side in store.ends(both, max_len)]
    return sides, bool(store.lengths.max() > max_len)


def windows(ids: list[int], width: int) -> list[Row]:
    """Split token ids into rows of at most `width` in which every token but the first is predicted exactly once."""
    return [(ids[i : i + width], [0] + [1] * (len(ids[i : i + width]) - 1)) for i in range(0, len(ids) - 1, width - 1)]


def _filled(item: Eval, found: Examples, add: Callable[[dict[str, Any], str], str]) -> Examples:
    """Fill `found` by calling `add` on rows until there are enough; `add` returns the reason for a skipped row."""
    for row, where in heldout_rows(item.source):
        try:
            why = add(row, where)
        except BadRow as error:
            if item.source.bad_rows != "drop":
                raise UserError(f"evals.{item.name}: {error}{ADVICE}") from error
            why = REASONS[error.reason]
        if why:
            found.left_out[why] += 1
        if len(found.encoded) >= item.count:
            break
    return found


DOCUMENTS = "rows of tokens"
TIED = "tied"
READERS: dict[str, Callable[[Eval, TextTokenizer, int, bool], Examples]] = {
    "bits_per_byte": _bits,
    "reward": _prompts,
    "best_of_n": _prompts,
    "pass_at_k": _prompts,
    "pair_accuracy": _pairs,
    "choice_accuracy": _choices,
    "continuation_accuracy": _choices,
    "core": _core,
}
