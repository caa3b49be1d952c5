"""One source, tokenised and ready to be drawn from: rows of training tokens by (epoch, place)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from lm.data import packing
from lm.data.curriculum.draw import mix64
from lm.data.order import permutation, permute
from lm.data.packing import Example, Row
from lm.data.sources import Rows
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import FLAWS, KINDS, Store, store_in_memory, store_of
from lm.experiment import UserError

EXAMPLES_A_ROW = 64  # generated examples set aside for one packed row; those that do not fit are passed over
LOOKED_AT = 256  # generated examples that a tally is taken over


@dataclass(frozen=True)
class Tally:
    """What became of a source's examples; `partial`: only of the first ones, the source has no end.

    `truncated` ones lost their end, or what `truncation` says; `reasons`: of those dropped how many, by why.
    """

    examples: int
    tokens: int
    trained: int
    truncated: int
    dropped: int
    partial: bool = False
    reasons: Mapping[str, int] = field(default_factory=dict)
    truncation: str = "truncated"

    def describe(self, unit: str) -> str:
        head = f"first {self.examples} {unit}" if self.partial else f"{self.examples} {unit}"
        rest = f"{self.tokens} tokens, {self.trained} trained on, {self.truncated} {self.truncation}, {self.dropped} dropped"
        return f"{head}, {rest}{f' ({self.describe_dropped()})' if self.reasons else ''}"

    def with_dropped(self, why: str, count: int) -> Tally:
        """As many examples more, dropped for a reason."""
        reasons = {why: count} | dict(self.reasons)
        return replace(self, examples=self.examples + count, dropped=self.dropped + count, reasons=reasons)

    def describe_dropped(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in self.reasons.items())


@dataclass(frozen=True)
class Supply:
    """`row(epoch, place)` for place in range(rows) gives one row of the batch, or two for a preference pair.

    `example(epoch, place)`, where it is given, is the number of what they are made of, the same in every epoch.
    """

    rows: int
    row: Callable[[int, int], list[Row]]
    tally: Tally
    unit: str
    example: Callable[[int, int], int] | None = None


@dataclass(frozen=True)
class Order:
    """How places become rows: shuffled anew in every epoch by `key`, or as they are (`key` None) for held-out data."""

    key: int | None

    def place(self, epoch: int, place: int, length: int) -> int:
        return place if self.key is None else permute(place, length, mix64(self.key + epoch))

    def places(self, epoch: int, length: int) -> Int64[np.ndarray, " N"]:
        """`place` of every place."""
        return np.arange(length) if self.key is None else permutation(length, mix64(self.key + epoch))


class Kept(NamedTuple):
    """The examples that a stage trains on, their numbers in `store` group by group (a conversation; the two of a pair)."""

    store: Store
    groups: Int64[np.ndarray, "G K"]
    tally: Tally


def windows(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order) -> Supply:
    """Documents one after another in a ring, cut into windows; each epoch goes round from another offset.

    Held-out documents are cut once, from the first token on. The first token of a window is not predicted.
    """
    store, numbers = _examples(rows, indices, "documents", tokenizer)
    stream = Ring.of(store, numbers[order.places(0, len(numbers))], seq_len if order.key is not None else 0)
    total = stream.total
    number = -(-total // seq_len)

    def row(epoch: int, place: int) -> list[Row]:
        start = order.place(epoch, place, number) * seq_len
        if order.key is not None:
            start = (start + mix64(order.key ^ mix64(epoch)) % seq_len) % total
        return [packing.window(stream, stream.bounds, start, seq_len, tokenizer.pad_id)]

    return Supply(number, row, Tally(len(numbers), total, total - number, 0, 0), "documents")


@dataclass(frozen=True)
class Ring:
    """Documents end to end, in any order of theirs, and the first `overlap` tokens once more: a ring that is cut open.

    bounds [D+1]: where each document begins, and the last ends; the overlap counts as one.
    """

    store: Store
    numbers: Int64[np.ndarray, " D"]
    bounds: Int64[np.ndarray, " D+1"]
    total: int

    @classmethod
    def of(cls, store: Store, numbers: Int64[np.ndarray, " D"], overlap: int) -> Ring:
        bounds = np.concatenate([[0], np.cumsum(store.lengths[numbers], dtype=np.int64)])
        total = int(bounds[-1])
        return cls(store, numbers, np.append(bounds, total + min(overlap, total)) if overlap else bounds, total)

    def __getitem__(self, where: slice) -> Int[np.ndarray, " N"]:
        """Tokens start … stop, or as many as there are."""
        start, stop = where.start, min(where.stop, int(self.bounds[-1]))
        pieces = [*self._read(start, min(stop, self.total)), *self._read(0, max(0, stop - self.total))]
        return np.concatenate(pieces)

    def _read(self, start: int, stop: int) -> Iterator[Int[np.ndarray, " N"]]:
        document = int(np.searchsorted(self.bounds, start, side="right")) - 1
        while start < stop:
            begin, end = int(self.bounds[document]), int(self.bounds[document + 1])
            yield self.store.column("tokens", int(self.numbers[document]), start - begin, stop - begin)
            start, document = end, document + 1


def conversations(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order) -> Supply:
    """Conversations packed into rows, trained on the assistant's turns; which share a row is settled once."""
    if rows.generated and order.key is not None:
        return _generated_conversations(rows, indices, seq_len, tokenizer, order)
    store, groups, tally = _keep(rows, indices, seq_len, tokenizer)
    numbers = groups[:, 0]
    plan = packing.pack(np.minimum(store.lengths[numbers], seq_len).tolist(), seq_len)

    def row(epoch: int, place: int) -> list[Row]:
        members = plan[order.place(epoch, place, len(plan))]
        return [packing.join([store.example(int(numbers[i]), seq_len) for i in members], seq_len, tokenizer.pad_id)]

    return Supply(len(plan), row, tally, "conversations")


def _generated_conversations(
    rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order
) -> Supply:
    """Each row is filled from a run of examples of its own, so that any row can be made without the ones before."""
    number = len(indices) // EXAMPLES_A_ROW

    def examples(first: int) -> Iterator[Example]:
        for k in range(first, first + EXAMPLES_A_ROW):
            (example,) = _made(rows, indices[k], "conversations", seq_len, tokenizer)
            if packing.is_trained(example):
                yield example

    def row(epoch: int, place: int) -> list[Row]:
        members: list[Example] = []
        room = seq_len
        for example in examples(order.place(epoch, place, number) * EXAMPLES_A_ROW):
            if len(example.tokens) > room:
                break
            members.append(example)
            room -= len(example.tokens)
        return [packing.join(members, seq_len, tokenizer.pad_id)]

    looked_at = [indices[k] for k in range(LOOKED_AT)]
    tally = _keep(rows, looked_at, seq_len, tokenizer).tally
    return Supply(number, row, replace(tally, partial=True), "conversations")


def pairs(
    rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order, ties: bool = False
) -> Supply:
    """Preference pairs: the chosen conversation in one row, the rejected in the next, trained on the last answer.

    Pairs that are a tie are left out unless `ties`.
    """
    groups = _answer_groups(rows, indices, "pairs", seq_len, tokenizer, order, ties)

    def example(epoch: int, place: int) -> int:
        return order.place(epoch, place, groups.number)

    def row(epoch: int, place: int) -> list[Row]:
        store, group = groups.find(example(epoch, place))
        assert store.margins is not None and store.ties is not None
        margin, tie = np.float32(store.margins[group[0]]), np.float32(store.ties[group[0]])
        sides = [packing.join([side], seq_len, tokenizer.pad_id) for side in store.ends(group, seq_len)]
        return [side._replace(margins=margin, ties=tie) for side in sides]

    return Supply(groups.number, row, groups.tally, "pairs", example)


def answers(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order) -> Supply:
    """Judged answers, one a row: of rows that have a label, or both sides of preference pairs, the chosen one desirable."""
    kind = "pairs" if "chosen" in rows[indices[0]] else "judged"
    groups = _answer_groups(rows, indices, kind, seq_len, tokenizer, order)
    size = KINDS[kind].examples_a_row

    def row(epoch: int, place: int) -> list[Row]:
        place, side = divmod(order.place(epoch, place, groups.number * size), size)
        store, group = groups.find(place)
        label = 1 - side if store.labels is None else store.labels[group[0]]
        joined = packing.join([store.ends(group, seq_len)[side]], seq_len, tokenizer.pad_id)
        return [joined._replace(desirable=np.float32(label))]

    return Supply(groups.number * size, row, groups.tally, kind)


class Groups(NamedTuple):
    """Answers, or pairs of them: how many there are, and of each where it is stored and its examples' numbers there."""

    number: int
    find: Callable[[int], tuple[Store, Int64[np.ndarray, " K"]]]
    tally: Tally


def _answer_groups(
    rows: Rows, indices: Sequence[int], kind: str, seq_len: int, tokenizer: Tokenizer, order: Order, ties: bool = False
) -> Groups:
    if not (rows.generated and order.key is not None):
        store, groups, tally = _keep_answers(rows, indices, kind, seq_len, tokenizer, ties)
        return Groups(len(groups), lambda place: (store, groups[place]), tally)
    looked_at = [indices[k] for k in range(LOOKED_AT)]
    tally = _keep_answers(rows, looked_at, kind, seq_len, tokenizer, ties).tally

    def find(place: int) -> tuple[Store, Int64[np.ndarray, " K"]]:
        index = indices[place]
        made = store_in_memory([(rows[index], rows.where(index))], kind, tokenizer)
        return made, np.arange(len(made))

    return Groups(len(indices), find, replace(tally, partial=True))


def _examples(
    rows: Rows, indices: Sequence[int], kind: str, tokenizer: Tokenizer
) -> tuple[Store, Int64[np.ndarray, " N"]]:
    """The examples of some rows: where they are stored, and the numbers of their rows there."""
    if rows.generated:
        return store_in_memory(((rows[i], rows.where(i)) for i in indices), kind, tokenizer), np.arange(len(indices))
    return store_of(rows, kind, tokenizer), np.asarray(indices)


def _made(rows: Rows, index: int, kind: str, seq_len: int, tokenizer: Tokenizer) -> list[Example]:
    """The examples of one row, made now."""
    store = store_in_memory([(rows[index], rows.where(index))], kind, tokenizer)
    return [store.example(number, seq_len) for number in range(len(store))]


def _keep(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer) -> Kept:
    """The conversations that still have a trained token when cut to seq_len, and what became of all."""
    store, numbers = _examples(rows, indices, "conversations", tokenizer)
    assert store.firsts is not None and store.trained is not None
    kept = numbers[store.firsts[numbers] < seq_len]
    if not len(kept):
        raise UserError(
            f"{rows.path}: cut to seq_len {seq_len}, none of {len(numbers)} examples has a token to train on; raise seq_len"
        )
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
    )
    return Kept(store, kept[:, None], tally)


def _keep_answers(
    rows: Rows, indices: Sequence[int], kind: str, seq_len: int, tokenizer: Tokenizer, ties: bool
) -> Kept:
    """The answers, or pairs of them, that something can be learned from, and what became of all."""
    store, numbers = _examples(rows, indices, kind, tokenizer)
    assert store.flaws is not None and store.trained is not None
    groups = numbers[:, None] * KINDS[kind].examples_a_row + np.arange(KINDS[kind].examples_a_row)
    of_prompts, of_answers = store.losses(groups, seq_len)
    reasons = {why: store.flaws[groups[:, 0]] == flaw for flaw, why in enumerate(FLAWS) if flaw}
    if store.ties is not None and not ties:
        reasons["tied"] = store.ties[groups[:, 0]] > 0
    reasons[f"with no room for an answer in seq_len {seq_len}"] = (of_answers >= store.trained[groups]).any(axis=1)
    left, dropped = np.ones(len(groups), bool), {}
    for why, those in reasons.items():
        dropped[why] = int((left & those).sum())
        left &= ~those
    tally = Tally(
        examples=len(groups),
        tokens=int((store.lengths[groups] - of_prompts[:, None] - of_answers)[left].sum()),
        trained=int((store.trained[groups] - of_answers)[left].sum()),
        truncated=int(((of_prompts > 0) | (of_answers > 0).any(axis=1))[left].sum()),
        dropped=int((~left).sum()),
        reasons={why: count for why, count in dropped.items() if count},
        truncation="cut",
    )
    if not left.any():
        raise UserError(f"{rows.path}: none of {len(groups)} {kind} is left to learn from: {tally.describe_dropped()}")
    return Kept(store, groups[left], tally)
