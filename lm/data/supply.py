"""Supplies: a source's tokenised rows by (epoch, place), with a tally of truncated and dropped examples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

from lm.config.field import one_line
from lm.data import packing
from lm.data.bad_rows import BadRow, with_advice
from lm.data.curriculum.draw import mix64
from lm.data.layouts import canonical
from lm.data.order import permutation, permute
from lm.data.packing import Example, PackedRow
from lm.data.sources import Rows
from lm.data.text_tokenizer import LEFT_OUT, TextTokenizer
from lm.data.tokens import KINDS, UNREAD_KEPT, Store, conversation_kind, flawed, left_out, store_in_memory, store_of
from lm.experiment import UserError

EXAMPLES_A_ROW = 64  # generated examples reserved for one packed row; those that do not fit are skipped
UNREAD_SHOWN = 12  # names of unread columns shown in one line
LOOKED_AT = 256  # generated examples that a tally counts


@dataclass(frozen=True)
class Tally:
    """Counts of a source's examples: kept, truncated, dropped; `partial`: only the first ones of an endless source.

    `truncated` examples lost `lost` tokens in all, at their end or as `truncation` says; `reasons`: number dropped by
    reason, `firsts`: location and description of the first of each. `unread`: columns, and keys
    of turns, that are not read; `notes`: further remarks on the files.
    """

    examples: int
    tokens: int
    trained: int
    truncated: int
    dropped: int
    partial: bool = False
    reasons: Mapping[str, int] = field(default_factory=dict)
    truncation: str = "truncated"
    lost: int = 0
    firsts: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self, unit: str) -> str:
        head = f"first {self.examples} {unit}" if self.partial else f"{self.examples} {unit}"
        rest = f"{self.tokens} tokens, {self.trained} trained on, {self.truncated} {self.truncation}, {self.dropped} dropped"
        why = f" ({self.describe_dropped()})" if self.reasons else ""
        return f"{head}, {rest}{why}{f', {self.lost} tokens cut off' if self.lost else ''}"

    def with_dropped(self, why: str, count: int) -> Tally:
        """The tally with `count` more examples dropped for a reason."""
        reasons = {why: count} | dict(self.reasons)
        return replace(self, examples=self.examples + count, dropped=self.dropped + count, reasons=reasons)

    def describe_dropped(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in self.reasons.items())

    def remarks(self) -> list[str]:
        """Remark lines: the first example of each reason, unread columns, notes."""
        lines = [f"{self.reasons[why]} dropped ({why}), the first: {first}" for why, first in self.firsts.items()]
        if self.unread:
            shown = ", ".join(one_line(f"{name:.60}") for name in self.unread[:UNREAD_SHOWN])
            more = f" and {len(self.unread) - UNREAD_SHOWN} more" if len(self.unread) > UNREAD_SHOWN else ""
            lines.append(f"not read by this stage: {shown}{more}")
        return [*lines, *self.notes]

    def to_json(self, source: str, unit: str) -> dict[str, Any]:
        """The tally as a JSON object, as in a stage's summary."""
        return {
            "source": source,
            "unit": unit,
            "examples": self.examples,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "truncated": self.truncated,
            "truncated_tokens": self.lost,
            "dropped": dict(self.reasons),
            "first": dict(self.firsts),
            "partial": self.partial,
            "unread": list(self.unread[:UNREAD_KEPT]),
        }


@dataclass(frozen=True)
class Supply:
    """A source's rows: `row(epoch, place)` for place in range(rows) is one row of a batch, or two of a preference pair.

    `example(epoch, place)`, if given, is the number of the example behind them, the same in every epoch.
    """

    rows: int
    row: Callable[[int, int], list[PackedRow]]
    tally: Tally
    unit: str
    example: Callable[[int, int], int] | None = None


@dataclass(frozen=True)
class Order:
    """Order of a source's rows: reshuffled every epoch by `key`, or unshuffled (`key` None) for held-out data."""

    key: int | None

    def place(self, epoch: int, place: int, length: int) -> int:
        return place if self.key is None else permute(place, length, mix64(self.key + epoch))

    def places(self, epoch: int, length: int) -> Int64[np.ndarray, " N"]:
        """The whole order of an epoch: `place`, vectorised."""
        return np.arange(length) if self.key is None else permutation(length, mix64(self.key + epoch))


class Kept(NamedTuple):
    """The examples that a stage trains on: numbers in `store` by group (a conversation, or the two of a pair)."""

    store: Store
    groups: Int64[np.ndarray, "G K"]
    tally: Tally


def windows(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: TextTokenizer, order: Order) -> Supply:
    """A supply of windows over the circular stream of documents; each epoch starts at another offset.

    The windows of held-out documents are the same in every epoch and start at the first token. The first token of a window is
    not predicted.
    """
    store, numbers, tally = _keep_documents(rows, indices, tokenizer)
    stream = CircularStream.of(store, numbers[order.places(0, len(numbers))], seq_len if order.key is not None else 0)
    total = stream.total
    number = -(-total // seq_len)

    def row(epoch: int, place: int) -> list[PackedRow]:
        start = order.place(epoch, place, number) * seq_len
        if order.key is not None:
            start = (start + mix64(order.key ^ mix64(epoch)) % seq_len) % total
        return [packing.window(stream, stream.bounds, start, seq_len, tokenizer.pad_id)]

    return Supply(number, row, replace(tally, tokens=total, trained=total - number), "documents")


@dataclass(frozen=True)
class CircularStream:
    """Concatenated documents in a given order, followed by the first `overlap` tokens again, as in a circular buffer.

    bounds [D+1]: the start of each document and the end of the last; the overlap counts as a document.
    """

    store: Store
    numbers: Int64[np.ndarray, " D"]
    bounds: Int64[np.ndarray, " D+1"]
    total: int

    @classmethod
    def of(cls, store: Store, numbers: Int64[np.ndarray, " D"], overlap: int) -> CircularStream:
        bounds = np.concatenate([[0], np.cumsum(store.lengths[numbers], dtype=np.int64)])
        total = int(bounds[-1])
        return cls(store, numbers, np.append(bounds, total + min(overlap, total)) if overlap else bounds, total)

    def __getitem__(self, where: slice) -> Int[np.ndarray, " N"]:
        """Tokens start … stop, or fewer at the end."""
        start, stop = where.start, min(where.stop, int(self.bounds[-1]))
        pieces = [*self._read(start, min(stop, self.total)), *self._read(0, max(0, stop - self.total))]
        return np.concatenate(pieces)

    def _read(self, start: int, stop: int) -> Iterator[Int[np.ndarray, " N"]]:
        document = int(np.searchsorted(self.bounds, start, side="right")) - 1
        while start < stop:
            begin, end = int(self.bounds[document]), int(self.bounds[document + 1])
            yield self.store.column("tokens", int(self.numbers[document]), start - begin, stop - begin)
            start, document = end, document + 1


def conversations(
    rows: Rows,
    indices: Sequence[int],
    seq_len: int,
    tokenizer: TextTokenizer,
    order: Order,
    loss_on: str = "answers",
    learn_end: bool = True,
) -> Supply:
    """A supply of conversations packed into rows, with the loss mask of the options; the packing is fixed for all epochs."""
    kind = conversation_kind(loss_on, learn_end)
    if rows.generated and order.key is not None:
        return _generated_conversations(rows, indices, seq_len, tokenizer, order, kind)
    store, groups, tally = _keep(rows, indices, seq_len, tokenizer, kind)
    numbers = groups[:, 0]
    plan = packing.pack(np.minimum(store.lengths[numbers], seq_len).tolist(), seq_len)

    def row(epoch: int, place: int) -> list[PackedRow]:
        members = plan[order.place(epoch, place, len(plan))]
        return [packing.join([store.example(int(numbers[i]), seq_len) for i in members], seq_len, tokenizer.pad_id)]

    return Supply(len(plan), row, tally, "conversations")


def _generated_conversations(
    rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: TextTokenizer, order: Order, kind: str
) -> Supply:
    """A supply of generated conversations; each row packs its own range of examples, so any row can be made alone."""
    number = len(indices) // EXAMPLES_A_ROW

    def examples(first: int) -> Iterator[Example]:
        for k in range(first, first + EXAMPLES_A_ROW):
            (example,) = _made(rows, indices[k], kind, seq_len, tokenizer)
            if packing.is_trained(example):
                yield example

    def row(epoch: int, place: int) -> list[PackedRow]:
        members: list[Example] = []
        room = seq_len
        for example in examples(order.place(epoch, place, number) * EXAMPLES_A_ROW):
            if len(example.tokens) > room:
                break
            members.append(example)
            room -= len(example.tokens)
        return [packing.join(members, seq_len, tokenizer.pad_id)]

    looked_at = [indices[k] for k in range(LOOKED_AT)]
    tally = _keep(rows, looked_at, seq_len, tokenizer, kind).tally
    return Supply(number, row, replace(tally, partial=True), "conversations")


def pairs(
    rows: Rows,
    indices: Sequence[int],
    seq_len: int,
    tokenizer: TextTokenizer,
    order: Order,
    ties: bool = False,
    margins: bool = False,
) -> Supply:
    """A supply of preference pairs: the chosen conversation in one row, the rejected in the next; loss on the last answer.

    Ties are left out unless `ties`; without `margins` the rows' margins are ignored and are 0.
    """
    kind = "pairs, with margins" if margins else "pairs"
    groups = _answer_groups(rows, indices, kind, seq_len, tokenizer, order, ties)

    def example(epoch: int, place: int) -> int:
        return order.place(epoch, place, groups.number)

    def row(epoch: int, place: int) -> list[PackedRow]:
        store, group = groups.find(example(epoch, place))
        assert store.margins is not None and store.ties is not None
        margin, tie = np.float32(store.margins[group[0]]), np.float32(store.ties[group[0]])
        sides = [packing.join([side], seq_len, tokenizer.pad_id) for side in store.ends(group, seq_len)]
        return [side._replace(margins=margin, ties=tie) for side in sides]

    return Supply(groups.number, row, groups.tally, "pairs", example)


def answers(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: TextTokenizer, order: Order) -> Supply:
    """A supply of labelled answers, one a row: rows with a label, or both sides of pairs, the chosen one desirable."""
    kind = "pairs" if _has_pairs(rows, indices) else "judged"
    groups = _answer_groups(rows, indices, kind, seq_len, tokenizer, order)
    size = KINDS[kind].examples_a_row

    def row(epoch: int, place: int) -> list[PackedRow]:
        place, side = divmod(order.place(epoch, place, groups.number * size), size)
        store, group = groups.find(place)
        label = 1 - side if store.labels is None else store.labels[group[0]]
        joined = packing.join([store.ends(group, seq_len)[side]], seq_len, tokenizer.pad_id)
        return [joined._replace(desirable=np.float32(label))]

    return Supply(groups.number * size, row, groups.tally, kind)


def _has_pairs(rows: Rows, indices: Sequence[int]) -> bool:
    """Whether the first readable row is a preference pair."""
    found = (canonical(rows[indices[k]]) for k in range(min(LOOKED_AT, len(indices))))
    return any("chosen" in row for row in itertools.islice((row for row in found if row), 1))


class Groups(NamedTuple):
    """Answers or pairs: their number, and for each the store and its examples' numbers there."""

    number: int
    find: Callable[[int], tuple[Store, Int64[np.ndarray, " K"]]]
    tally: Tally


def _answer_groups(
    rows: Rows,
    indices: Sequence[int],
    kind: str,
    seq_len: int,
    tokenizer: TextTokenizer,
    order: Order,
    ties: bool = False,
) -> Groups:
    if not (rows.generated and order.key is not None):
        store, groups, tally = _keep_answers(rows, indices, kind, seq_len, tokenizer, ties)
        return Groups(len(groups), lambda place: (store, groups[place]), tally)
    looked_at = [indices[k] for k in range(LOOKED_AT)]
    tally = _keep_answers(rows, looked_at, kind, seq_len, tokenizer, ties).tally

    def find(place: int) -> tuple[Store, Int64[np.ndarray, " K"]]:
        index = indices[place]
        made = store_in_memory([(rows[index], rows.where(index))], kind, tokenizer, rows.drop)
        return made, np.arange(len(made))

    return Groups(len(indices), find, replace(tally, partial=True))


def _examples(
    rows: Rows, indices: Sequence[int], kind: str, tokenizer: TextTokenizer
) -> tuple[Store, Int64[np.ndarray, " N"]]:
    """The store of some rows' examples, and the numbers of the rows in it."""
    with with_advice():
        if rows.generated:
            named = ((rows[i], rows.where(i)) for i in indices)
            return store_in_memory(named, kind, tokenizer, rows.drop), np.arange(len(indices))
        return store_of(rows, kind, tokenizer), np.asarray(indices)


def _made(rows: Rows, index: int, kind: str, seq_len: int, tokenizer: TextTokenizer) -> list[Example]:
    """The examples of one row, tokenised on demand."""
    store = store_in_memory([(rows[index], rows.where(index))], kind, tokenizer, rows.drop)
    return [store.example(number, seq_len) for number in range(len(store))]


class Dropped(NamedTuple):
    """The examples `left`, and by reason the number and the first of those dropped."""

    left: Bool[np.ndarray, " N"]
    counts: dict[str, int]
    firsts: dict[str, str]


def _drop(rows: Rows, indices: Sequence[int], kind: str, reasons: Mapping[str, Bool[np.ndarray, " N"]]) -> Dropped:
    """Drop the rows that have any reason; each counts under its first reason."""
    left = np.ones(len(indices), bool)
    counts, firsts = {}, {}
    for why, those in reasons.items():
        if (gone := left & those).any():
            counts[why] = int(gone.sum())
            firsts[why] = show_row(rows, int(indices[int(np.argmax(gone))]), kind)
        left &= ~those
    return Dropped(left, counts, firsts)


def show_row(rows: Rows, index: int, kind: str) -> str:
    """One line that shows a row: its location, and its error or its beginning."""
    row, where = rows[index], rows.where(index)
    try:
        KINDS[kind].make(row, where, KINDS[kind].rendering)
    except BadRow as error:
        return str(error)
    return excerpt(row, where)


def excerpt(row: Mapping[str, Any], where: str) -> str:
    """One line with a row's location and beginning."""
    return f"{where}: {json.dumps(row, ensure_ascii=True, default=str):.120}"


def _notes(rows: Rows, store: Store, kept: Int64[np.ndarray, " N"]) -> dict[str, Any]:
    unread = () if rows.generated or not rows.parts else store.unread
    return {"unread": unread, "notes": (*rows.notes, *_template_notes(store, kept))}


def _template_notes(store: Store, kept: Int64[np.ndarray, " N"]) -> Iterator[str]:
    """Remarks on a model's chat template: what it left out of examples, and tokens that straddle the edges of answers."""
    if store.left_out is None or store.straddling is None:
        return
    for number, name in enumerate(LEFT_OUT):
        if count := int((store.left_out[kept] >> number & 1).sum()):
            yield left_out_note(count, name)
    if count := int(store.straddling[kept].sum()):
        yield f"{count} tokens hold characters of an answer and of what is beside it; the loss covers them"


def left_out_note(count: int, what: str) -> str:
    return f"in {count} examples the chat template leaves out {what}"


def _none_left(rows: Rows, what: str, dropped: Dropped) -> UserError:
    reasons = ", ".join(f"{count} {why}" for why, count in dropped.counts.items())
    first = next(iter(dropped.firsts.values()))
    return UserError(f"{rows.path}: none of {what} is left to train on: {reasons}; the first: {first}")


def _keep_documents(
    rows: Rows, indices: Sequence[int], tokenizer: TextTokenizer
) -> tuple[Store, Int64[np.ndarray, " N"], Tally]:
    """The documents with a non-empty text."""
    store, numbers = _examples(rows, indices, "documents", tokenizer)
    dropped = _drop(rows, indices, "documents", flawed(store, numbers))
    if not dropped.left.any():
        raise _none_left(rows, f"{len(numbers)} documents", dropped)
    tally = Tally(
        len(numbers),
        0,
        0,
        0,
        int((~dropped.left).sum()),
        reasons=dropped.counts,
        firsts=dropped.firsts,
        **_notes(rows, store, numbers[dropped.left]),
    )
    return store, numbers[dropped.left], tally


def _keep(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: TextTokenizer, kind: str) -> Kept:
    """The conversations that have a token with loss after truncation to seq_len, and a tally."""
    store, numbers = _examples(rows, indices, kind, tokenizer)
    assert store.firsts is not None and store.trained is not None
    reasons = flawed(store, numbers)
    reasons[f"with no token to train on in seq_len {seq_len}"] = store.firsts[numbers] >= seq_len
    dropped = _drop(rows, indices, kind, reasons)
    kept = numbers[dropped.left]
    if not len(kept):
        if (store.flaws[numbers] == 0).all():
            raise UserError(
                f"{rows.path}: cut to seq_len {seq_len}, none of {len(numbers)} examples has a token to train on; raise "
                "seq_len"
            )
        raise _none_left(rows, f"{len(numbers)} conversations", dropped)
    lengths = store.lengths[kept]
    cut = lengths > seq_len
    trained = int(store.trained[kept[~cut]].sum())
    trained += sum(int(store.column("mask", int(i), 1, seq_len).sum()) for i in kept[cut])
    tally = Tally(
        examples=len(numbers),
        tokens=int(np.minimum(lengths, seq_len).sum()),
        trained=trained,
        truncated=int(cut.sum()),
        dropped=len(numbers) - len(kept),
        lost=int((lengths[cut] - seq_len).sum()),
        reasons=dropped.counts,
        firsts=dropped.firsts,
        **_notes(rows, store, kept),
    )
    return Kept(store, kept[:, None], tally)


def _keep_answers(
    rows: Rows, indices: Sequence[int], kind: str, seq_len: int, tokenizer: TextTokenizer, ties: bool
) -> Kept:
    """The answers or pairs that can be trained on, and a tally."""
    store, numbers = _examples(rows, indices, kind, tokenizer)
    assert store.trained is not None
    groups = numbers[:, None] * KINDS[kind].examples_a_row + np.arange(KINDS[kind].examples_a_row)
    tied = store.ties[groups[:, 0]] > 0 if store.ties is not None and not ties else np.zeros(len(groups), bool)
    reasons = {"tied": tied} | left_out(store, groups, seq_len)
    dropped = _drop(rows, indices, kind, reasons)
    left = dropped.left
    of_prompts, of_answers = store.losses(groups[left], seq_len)
    lost = of_prompts[:, None] + of_answers
    tally = Tally(
        examples=len(groups),
        tokens=int((store.lengths[groups[left]] - lost).sum()),
        trained=int((store.trained[groups[left]] - of_answers).sum()),
        truncated=int((lost > 0).any(axis=1).sum()),
        dropped=int((~left).sum()),
        lost=int(lost.sum()),
        reasons=dropped.counts,
        truncation="cut",
        firsts=dropped.firsts,
        **_notes(rows, store, groups[left].reshape(-1)),
    )
    if not left.any():
        raise _none_left(rows, f"{len(groups)} {kind.partition(',')[0]}", dropped)
    return Kept(store, groups[left], tally)
