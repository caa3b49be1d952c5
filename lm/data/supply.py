"""One source, tokenised and ready to be drawn from: rows of training tokens by (epoch, place)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lm.data import chat, packing
from lm.data.curriculum.draw import mix64
from lm.data.order import permute
from lm.data.packing import Example, Row
from lm.data.sources import Rows
from lm.data.tokenizer import Tokenizer
from lm.experiment import UserError

ENCODED_AT_ONCE = 256  # documents whose tokens are Python integers at the same time
EXAMPLES_A_ROW = 64  # generated examples set aside for one packed row; those that do not fit are passed over
LOOKED_AT = 256  # generated examples that a tally is taken over


@dataclass(frozen=True)
class Tally:
    """What became of a source's examples; `partial`: only of the first ones, the source has no end."""

    examples: int
    tokens: int
    trained: int
    truncated: int
    dropped: int
    partial: bool = False

    def describe(self, unit: str) -> str:
        head = f"first {self.examples} {unit}" if self.partial else f"{self.examples} {unit}"
        rest = f"{self.tokens} tokens, {self.trained} trained on, {self.truncated} truncated, {self.dropped} dropped"
        return f"{head}, {rest}"


@dataclass(frozen=True)
class Supply:
    """`row(epoch, place)` for place in range(rows) gives one row of the batch, or two for a preference pair."""

    rows: int
    row: Callable[[int, int], list[Row]]
    tally: Tally
    unit: str


@dataclass(frozen=True)
class Order:
    """How places become rows: shuffled anew in every epoch by `key`, or as they are (`key` None) for held-out data."""

    key: int | None

    def place(self, epoch: int, place: int, length: int) -> int:
        return place if self.key is None else permute(place, length, mix64(self.key + epoch))


def windows(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order) -> Supply:
    """Documents one after another in a ring, cut into windows; each epoch goes round from another offset.

    Held-out documents are cut once, from the first token on. The first token of a window is not predicted.
    """
    count = len(indices)
    shuffled = [indices[order.place(0, i, count)] for i in range(count)]
    stream, bounds = _documents(rows, shuffled, tokenizer)
    total = len(stream)
    number = -(-total // seq_len)
    if order.key is not None:
        stream = np.concatenate([stream, stream[:seq_len]])
        bounds = np.append(bounds, len(stream))

    def row(epoch: int, place: int) -> list[Row]:
        start = order.place(epoch, place, number) * seq_len
        if order.key is not None:
            start = (start + mix64(order.key ^ mix64(epoch)) % seq_len) % total
        return [packing.window(stream, bounds, start, seq_len, tokenizer.pad_id)]

    return Supply(number, row, Tally(count, total, total - number, 0, 0), "documents")


def conversations(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order) -> Supply:
    """Conversations packed into rows, trained on the assistant's turns; which share a row is settled once."""
    render = _conversation(rows, tokenizer)
    if rows.generated and order.key is not None:
        return _generated_conversations(rows.path, render, indices, seq_len, tokenizer, order)
    store, tally = _collect(((example,) for example in map(render, indices)), seq_len, rows.path)
    plan = packing.pack(store.lengths(), seq_len)

    def row(epoch: int, place: int) -> list[Row]:
        members = plan[order.place(epoch, place, len(plan))]
        return [packing.join([store[i] for i in members], seq_len, tokenizer.pad_id)]

    return Supply(len(plan), row, tally, "conversations")


def _generated_conversations(
    path: str,
    render: Callable[[int], Example],
    indices: Sequence[int],
    seq_len: int,
    tokenizer: Tokenizer,
    order: Order,
) -> Supply:
    """Each row is filled from a run of examples of its own, so that any row can be made without the ones before."""
    number = len(indices) // EXAMPLES_A_ROW

    def examples(first: int) -> Iterator[Example]:
        for k in range(first, first + EXAMPLES_A_ROW):
            example = packing.truncate(render(indices[k]), seq_len)
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

    _, tally = _collect(((render(indices[k]),) for k in range(LOOKED_AT)), seq_len, path, partial=True)
    return Supply(number, row, tally, "conversations")


def pairs(rows: Rows, indices: Sequence[int], seq_len: int, tokenizer: Tokenizer, order: Order) -> Supply:
    """Preference pairs: the chosen conversation in one row, the rejected in the next, trained on the last answer."""

    def render(index: int) -> tuple[Example, Example]:
        chosen, rejected = chat.preference_messages(rows[index], rows.where(index))
        return _last_answer(chosen, tokenizer), _last_answer(rejected, tokenizer)

    if rows.generated and order.key is not None:
        _, tally = _collect((render(indices[k]) for k in range(LOOKED_AT)), seq_len, rows.path, partial=True)

        def sides(place: int) -> tuple[Example, ...]:
            return tuple(packing.truncate(side, seq_len) for side in render(indices[place]))

        number = len(indices)
    else:
        store, tally = _collect(map(render, indices), seq_len, rows.path)
        number = len(store) // 2

        def sides(place: int) -> tuple[Example, ...]:
            return store[2 * place], store[2 * place + 1]

    def row(epoch: int, place: int) -> list[Row]:
        both = sides(order.place(epoch, place, number))
        return [packing.join([side], seq_len, tokenizer.pad_id) for side in both]

    return Supply(number, row, tally, "pairs")


class _Store:
    """Examples of any length in two flat arrays."""

    def __init__(self, examples: Sequence[Example]):
        self._tokens = np.concatenate([e.tokens for e in examples]).astype(np.int32)
        self._mask = np.concatenate([e.mask for e in examples]).astype(np.int8)
        self._bounds = np.cumsum([0, *(len(e.tokens) for e in examples)])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Example:
        here = slice(self._bounds[index], self._bounds[index + 1])
        return Example(self._tokens[here], self._mask[here])

    def lengths(self) -> list[int]:
        return np.diff(self._bounds).tolist()


def _collect(
    groups: Iterable[tuple[Example, ...]], seq_len: int, path: str, partial: bool = False
) -> tuple[_Store, Tally]:
    """Keep the groups (conversations, or pairs of them) of which every member still has a trained token when cut."""
    kept: list[Example] = []
    seen = truncated = dropped = 0
    for group in groups:
        seen += 1
        cut = [packing.truncate(example, seq_len) for example in group]
        if all(map(packing.is_trained, cut)):
            kept += cut
            truncated += any(len(example.tokens) > seq_len for example in group)
        else:
            dropped += 1
    if not kept:
        raise UserError(
            f"{path}: cut to seq_len {seq_len}, none of {seen} examples has a token to train on; raise seq_len"
        )
    tokens = sum(len(example.tokens) for example in kept)
    trained = sum(int(example.mask[1:].sum()) for example in kept)
    return _Store(kept), Tally(seen, tokens, trained, truncated, dropped, partial)


def _documents(rows: Rows, indices: Sequence[int], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the documents, an end-of-text token before and after each, and where each begins (the last ends)."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    pieces: list[np.ndarray] = []
    todo = iter(indices)
    while some := list(islice(todo, ENCODED_AT_ONCE)):
        encoded = tokenizer.encode_batch([_text(rows, index) for index in some])
        pieces += [np.array([tokenizer.pad_id, *ids, tokenizer.pad_id], dtype) for ids in encoded]
    return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])


def _text(rows: Rows, index: int) -> str:
    row = rows[index]
    if "text" not in row:
        raise UserError(
            f"{rows.where(index)}: this stage needs the column text; the columns found are {', '.join(row)}"
        )
    if not isinstance(row["text"], str):
        raise UserError(f"{rows.where(index)}: text must be a string, found {row['text']!r:.40}")
    return row["text"]


def _conversation(rows: Rows, tokenizer: Tokenizer) -> Callable[[int], Example]:
    def render(index: int) -> Example:
        messages = chat.training_messages(rows[index], rows.where(index))
        return Example(*map(np.array, chat.render(messages, tokenizer)))

    return render


def _last_answer(messages: list[dict[str, str]], tokenizer: Tokenizer) -> Example:
    """The conversation rendered, its mask kept on the last turn only."""
    tokens, mask = map(np.array, chat.render(messages, tokenizer))
    turn_starts = np.flatnonzero(tokens == tokenizer.special_ids[chat.TURN_START])
    mask[: turn_starts[-1]] = 0
    return Example(tokens, mask)
