"""Tokenised examples of a source, computed once and cached as arrays, at full length.

A cache entry depends only on the file, the tokenizer and the kind of example: holdout, seq_len,
seed and order are applied when the tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from lm.data import bad_rows, chat, layouts, readers
from lm.data.bad_rows import REASONS, BadRow, Unreadable
from lm.data.cache import Entry, Writer, current_cache
from lm.data.packing import Example
from lm.data.readers import Row
from lm.data.sources import Rows
from lm.data.text_tokenizer import LEFT_OUT, TextTokenizer
from lm.data.workers import WorkerPool

NEVER = np.iinfo(np.int32).max  # `firsts` of an example without any loss
UNREAD_KEPT = 100  # approximate number of names of unread columns kept for a piece
ENCODED_AT_ONCE = 256  # documents (or rows in memory) whose tokens are held as Python integers at once

TEMPLATE_SLOWNESS = 8  # a chat template takes about so many times as long as ChatML

Named = tuple[Row, str]  # a row, and its location for messages
Columns = dict[str, np.ndarray]
ANSWERED = (
    "firsts",
    "trained",
    "prompts",
    "flaws",
    "margins",
    "ties",
    "labels",
    "straddling",
    "left_out",
)  # columns of some kinds only
Reads = Literal["documents", "conversations", "pairs", "judged", "prompts"]


class Rendering(NamedTuple):
    """Options of tokenising conversations: what the loss covers, and whether pairs have margins."""

    loss_on: Literal["answers", "all"] = "answers"
    learn_end: bool = True
    margins: bool = False


class Made(NamedTuple):
    """The examples of one row, its numbers by column, and its flaw: an index into REASONS."""

    examples: tuple[Any, ...]
    numbers: Mapping[str, float] = {}
    flaw: int = bad_rows.WHOLE


class Kind(NamedTuple):
    """A kind of example: how rows become examples, and the columns that are stored.

    All kinds: tokens [tokens], lengths [examples], flaws [examples] (an index into REASONS; flawed examples are not trained on).
    Conversations and pairs: mask [tokens] (1: loss), firsts [examples] (the first token with loss after the first token, or
    NEVER), trained [examples] (the number of tokens with loss). Pairs and labelled answers: prompts [examples] (start of the
    last turn). With a model's chat template: straddling [examples] (tokens with characters both of an answer and of other
    text), left_out [examples] (bits by number in LEFT_OUT). Pairs: margins, ties [examples]. Labelled answers: labels [examples]
    (1: desirable). `unread` has the columns and keys that were not read, one a line.
    """

    make: Callable[[Row, str, Rendering], Made]
    encode: Callable[[TextTokenizer, Sequence[Any], Rendering], Columns]
    reads: Reads
    rendering: Rendering = Rendering()
    examples_a_row: int = 1
    numbers: Mapping[str, type] = {}


@dataclass(frozen=True)
class Store:
    """The tokenised examples of a source by number, in the order of its rows.

    lengths, parts, starts: [examples]: each example's length, the index of its block, and its start in the block.
    """

    blocks: Sequence[Callable[[str], np.ndarray]]
    lengths: Int[np.ndarray, " N"]
    parts: Int[np.ndarray, " N"]
    starts: Int64[np.ndarray, " N"]
    flaws: Int[np.ndarray, " N"]
    firsts: Int[np.ndarray, " N"] | None = None
    trained: Int[np.ndarray, " N"] | None = None
    prompts: Int[np.ndarray, " N"] | None = None
    margins: Float32[np.ndarray, " N"] | None = None
    ties: Int[np.ndarray, " N"] | None = None
    labels: Int[np.ndarray, " N"] | None = None
    straddling: Int[np.ndarray, " N"] | None = None
    left_out: Int[np.ndarray, " N"] | None = None
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, name: str, number: int, start: int, stop: int) -> np.ndarray:
        """Slice start … stop of an example's tokens or mask; stop may exceed its length."""
        begin = int(self.starts[number])
        return self.blocks[self.parts[number]](name)[begin + start : begin + min(stop, int(self.lengths[number]))]

    def example(self, number: int, seq_len: int) -> Example:
        """An example, truncated to seq_len tokens."""
        return Example(self.column("tokens", number, 0, seq_len), self.column("mask", number, 0, seq_len))

    def losses(
        self, groups: Int64[np.ndarray, "G K"], seq_len: int
    ) -> tuple[Int[np.ndarray, " G"], Int[np.ndarray, "G K"]]:
        """Left-truncation to seq_len: (tokens cut from a group's prompt, tokens cut from each of its answers).

        Both answers of a pair lose the same part of their prompt. An answer is truncated only after its whole prompt; its
        header is kept, and so is its end of turn unless all of `trained` is cut.
        """
        assert self.prompts is not None
        lengths = self.lengths[groups]
        prompt = np.clip(lengths.max(axis=1) - seq_len, 0, self.prompts[groups[:, 0]])
        return prompt, np.maximum(lengths - prompt[:, None] - seq_len, 0)

    def ends(self, group: Int64[np.ndarray, " K"], seq_len: int) -> list[Example]:
        """An answer, or the two of a pair, each left-truncated to seq_len tokens as in `losses`."""
        prompt, answers = self.losses(group[None], seq_len)
        return [
            self._end(number, int(prompt[0]), int(lost))
            for number, lost in zip(group.tolist(), answers[0], strict=True)
        ]

    def _end(self, number: int, prompt: int, answer: int) -> Example:
        assert self.firsts is not None
        first, stop = int(self.firsts[number]), int(self.lengths[number])
        spans = [(prompt, first), (first + answer, stop)] if answer else [(prompt, stop)]
        tokens, mask = (
            np.concatenate([self.column(name, number, *span) for span in spans]) for name in ("tokens", "mask")
        )
        return Example(tokens, mask)


def store_of(rows: Rows, kind: str, tokenizer: TextTokenizer) -> Store:
    """The tokenised examples of a finite source, from the cache or computed now."""
    cache = current_cache()
    made_of = {"kind": kind, "tokenizer": tokenizer.fingerprint} | rows.reading()
    label = f"{rows.path}: tokenising"
    if not rows.parts:
        # Rows in memory are few, so they are not cached.
        def build(writer: Writer) -> None:
            named = ((rows[i], rows.where(i)) for i in range(len(rows)))
            for columns in _in_pieces(named, kind, tokenizer, rows.drop):
                _append(writer, columns)

        return _store([cache.entry("tokens", made_of | {"content": rows.fingerprint}, build, rows.path)])
    shared = kind, tokenizer, rows.drop
    slowness = TEMPLATE_SLOWNESS if tokenizer.has_template and kind != "documents" else 1
    with WorkerPool(label, "tokens", sum(part.text_bytes for part in rows.parts), shared, slowness=slowness) as pool:

        def entry(part: Any) -> Entry:
            def build(writer: Writer) -> None:
                for size, columns in pool.map(_encode_piece, part.pieces(slowness)):
                    _append(writer, columns)
                    pool.progress.advance(size, len(columns["tokens"]))

            content = {"content": part.fingerprint, "format": part.packed}
            return cache.entry("tokens", made_of | content, build, part.name)

        return _store(pool.each(entry, rows.parts))


def store_in_memory(named: Iterable[Named], kind: str, tokenizer: TextTokenizer, drop: bool = False) -> Store:
    """Tokenise a few rows without caching; `drop` keeps bad rows as flaws instead of raising."""
    pieces = list(_in_pieces(named, kind, tokenizer, drop))
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return _assembled([columns.__getitem__], [columns])


def left_out(store: Store, groups: Int64[np.ndarray, "G K"], seq_len: int) -> dict[str, Bool[np.ndarray, " G"]]:
    """Reason → the answers or pairs without a training signal after truncation to seq_len; a group may have several reasons."""
    assert store.trained is not None and store.prompts is not None
    reasons = flawed(store, groups[:, 0])
    of_prompts, of_answers = store.losses(groups, seq_len)
    room = f"in seq_len {seq_len}"
    reasons[f"with no room for an answer {room}"] = (of_answers >= store.trained[groups]).any(axis=1)
    equal = np.zeros(len(groups), bool)
    for number in np.flatnonzero((of_answers > 0).any(axis=1)) if groups.shape[1] == 2 else ():
        chosen, rejected = store.ends(groups[number], seq_len)
        equal[number] = np.array_equal(chosen.tokens, rejected.tokens)
    reasons[f"with answers that are equal once truncated, {room}"] = equal
    reasons[f"whose prompt is truncated away, {room}"] = (of_prompts > 0) & (of_prompts >= store.prompts[groups[:, 0]])
    return reasons


def flawed(store: Store, numbers: Int64[np.ndarray, " N"]) -> dict[str, Bool[np.ndarray, " N"]]:
    """Reason → the examples that are flawed for it."""
    flaws = store.flaws[numbers]
    return {REASONS[flaw]: flaws == flaw for flaw in np.unique(flaws).tolist() if flaw}


def _store(entries: Sequence[Entry]) -> Store:
    names = [name for name in entries[0].files if name not in ("tokens", "mask")]
    columns = [{name: entry.span(name, 0, entry.length(name)) for name in names} for entry in entries]
    return _assembled([entry.array for entry in entries], columns)


def _assembled(blocks: Sequence[Callable[[str], np.ndarray]], columns: Sequence[Mapping[str, np.ndarray]]) -> Store:
    def whole(name: str) -> np.ndarray:
        return np.concatenate([one[name] for one in columns])

    lengths = [one["lengths"] for one in columns]
    return Store(
        blocks=blocks,
        lengths=whole("lengths"),
        parts=np.repeat(np.arange(len(lengths), dtype=np.int32), [len(some) for some in lengths]),
        starts=np.concatenate([np.cumsum(some, dtype=np.int64) - some for some in lengths]),
        unread=tuple(dict.fromkeys(whole("unread").tobytes().decode().split("\0")[:-1])),
        **{name: whole(name) for name in ANSWERED if name in columns[0]},
    )


def _append(writer: Writer, columns: Columns) -> None:
    for name, values in columns.items():
        writer.append(name, values)


def _in_pieces(named: Iterable[Named], kind: str, tokenizer: TextTokenizer, drop: bool) -> Iterator[Columns]:
    todo = iter(named)
    while some := list(islice(todo, ENCODED_AT_ONCE)):
        yield encode(KINDS[kind], tokenizer, some, drop)


def _encode_piece(shared: tuple[str, TextTokenizer, bool], piece: readers.Piece) -> tuple[int, Columns]:
    """Tokenise a piece of a file: (bytes of text, columns)."""
    kind, tokenizer, drop = shared
    named = ((row, piece.where(place)) for place, row in enumerate(readers.read(piece)))
    return piece.text_bytes, encode(KINDS[kind], tokenizer, named, drop)


def encode(kind: Kind, tokenizer: TextTokenizer, named: Iterable[Named], drop: bool) -> Columns:
    """Tokenise rows into columns. A bad row raises; with `drop` it becomes an example without tokens."""
    todo, unread, words = iter(named), dict[str, None](), tokenizer.template_words
    parts: list[Columns] = []
    while some := list(islice(todo, ENCODED_AT_ONCE)):
        made = [_made(kind, row, where, drop) for row, where in some]
        for row, _ in some if len(unread) < UNREAD_KEPT else ():
            unread |= dict.fromkeys(
                unread_columns(row, kind.reads, ("margin",) if kind.rendering.margins else (), words)
            )
        each = kind.examples_a_row
        made, columns = _encoded(kind, tokenizer, made, [where for _, where in some], drop)
        columns["flaws"] = np.repeat(np.array([one.flaw for one in made], np.int8), each)
        for name, dtype in kind.numbers.items():
            columns[name] = np.repeat(np.array([one.numbers.get(name, 0) for one in made], dtype), each)
        parts.append(columns)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return joined | {
        "unread": np.frombuffer("".join(f"{name}\0" for name in unread).encode(errors="replace"), np.uint8)
    }


def _made(kind: Kind, row: Row, where: str, drop: bool) -> Made:
    try:
        return kind.make(row, where, kind.rendering)
    except BadRow as error:
        if not drop:
            raise
        return Made((None,) * kind.examples_a_row, flaw=error.reason)


def _encoded(
    kind: Kind, tokenizer: TextTokenizer, made: list[Made], wheres: Sequence[str], drop: bool
) -> tuple[list[Made], Columns]:
    """The columns of examples, without those that the chat template refuses."""
    try:
        return made, kind.encode(tokenizer, [example for one in made for example in one.examples], kind.rendering)
    except BadRow:
        kept = [_renderable(kind, tokenizer, one, where, drop) for one, where in zip(made, wheres, strict=True)]
        return kept, kind.encode(tokenizer, [example for one in kept for example in one.examples], kind.rendering)


def _renderable(kind: Kind, tokenizer: TextTokenizer, made: Made, where: str, drop: bool) -> Made:
    try:
        kind.encode(tokenizer, made.examples, kind.rendering)
        return made
    except BadRow as error:
        if not drop:
            raise BadRow(f"{where}: {error}", error.reason) from error
        return Made((None,) * kind.examples_a_row, flaw=error.reason)


def unread_columns(
    row: Row, reads: Reads, others: Sequence[str] = (), template_words: Container[str] = ()
) -> Iterator[str]:
    """Columns of a row, and keys of its turns, that this kind of example does not read, except `others`."""
    if isinstance(row, Unreadable):
        return
    known: tuple[str, ...] = ("key", *(name for name in layouts.TOOL_COLUMNS if _is_tools(row.get(name))), *others)
    if template_words and isinstance(variables := row.get(layouts.VARIABLE_COLUMN), Mapping):
        known = (*known, layouts.VARIABLE_COLUMN)
        yield from (f"{layouts.VARIABLE_COLUMN}.{name}" for name in variables if name not in template_words)
    names = frozenset(str(name) for name, value in row.items() if value is not None and name not in known)
    used = layouts.read_columns(names, reads)
    yield from sorted(names - used)
    for name in sorted(used):
        if isinstance(row[name], list):
            for turn in row[name]:
                if isinstance(turn, Mapping):
                    yield from (
                        f"{name}[].{key}"
                        for key, value in turn.items()
                        if value and key not in chat.READ_KEYS and key not in template_words
                    )


def _is_tools(value: Any) -> bool:
    """Whether a column of tools is read: it is empty, or has definitions; in other data it may be any text."""
    return not isinstance(value, str) or value.strip() in ("", "null") or value.lstrip().startswith(("[", "{"))


def _dtype(tokenizer: TextTokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def _make_document(row: Row, where: str, _: Rendering) -> Made:
    text = _text(row, where)
    return Made((text,)) if text.strip() else Made((None,), flaw=bad_rows.EMPTY_TEXT)


def _encode_documents(tokenizer: TextTokenizer, texts: Sequence[str | None], _: Rendering) -> Columns:
    """Encode documents with an end-of-text token before and after each."""
    dtype, (start, end) = _dtype(tokenizer), tokenizer.document_ids
    encoded = iter(tokenizer.encode_batch([text for text in texts if text is not None]))
    pieces: list[np.ndarray] = [np.array([] if text is None else [start, *next(encoded), end], dtype) for text in texts]
    return {"tokens": np.concatenate(pieces), "lengths": np.array([len(piece) for piece in pieces], np.int32)}


def _make_conversation(row: Row, where: str, how: Rendering) -> Made:
    """A conversation with loss on the assistant's turns or on all, except turns flagged 0."""
    messages = chat.training_messages(row, where, how.loss_on)
    learnt = [turn for turn in messages if turn.get("train", True)]
    answers = [turn for turn in learnt if turn["role"] == "assistant"]
    example = chat.ChatInput(messages, chat.tools_of(row, where), chat.variables_of(row, where))
    if not (answers if how.loss_on == "answers" else learnt):
        return Made((example,), flaw=bad_rows.UNMARKED)
    return Made((example,), flaw=0 if all(chat.said_by(turn).strip() for turn in answers) else bad_rows.EMPTY_ANSWER)


def _make_pair(row: Row, where: str, how: Rendering) -> Made:
    """A preference pair, the chosen conversation and then the rejected, with loss on the last answer."""
    sides = chat.preference_messages(row, where)
    numbers = {"ties": float(chat.is_tie(row, where)), "margins": chat.margin_of(row, where) if how.margins else 0.0}
    offered = chat.tools_of(row, where), chat.variables_of(row, where)
    examples = tuple(chat.ChatInput(side, *offered) for side in sides)
    return Made(examples, numbers, 0 if numbers["ties"] else _flaw(*sides))


def _make_judged(row: Row, where: str, _: Rendering) -> Made:
    """A labelled answer, with loss on it."""
    messages, label = chat.judged_messages(row, where)
    example = chat.ChatInput(messages, chat.tools_of(row, where), chat.variables_of(row, where))
    return Made((example,), {"labels": label}, _flaw(messages))


def _encode_conversations(tokenizer: TextTokenizer, conversations: Sequence[Any], how: Rendering) -> Columns:
    return _examples(
        tokenizer,
        [
            chat.Rendered([], [])
            if one is None
            else chat.render(
                one.messages,
                tokenizer,
                loss_on=how.loss_on,
                learn_end=how.learn_end,
                tools=one.tools,
                variables=one.variables,
            )
            for one in conversations
        ],
    )


def _encode_answers(tokenizer: TextTokenizer, conversations: Sequence[Any], _: Rendering) -> Columns:
    """Encode conversations with loss on the last turn only."""
    examples, prompts = [], []
    for one in conversations:
        found = (
            chat.render(one.messages, tokenizer, tools=one.tools, variables=one.variables)
            if one
            else chat.Rendered([], [])
        )
        start = found.last_turn
        examples.append(found._replace(mask=[0] * start + found.mask[start:]))
        prompts.append(start)
    return _examples(tokenizer, examples) | {"prompts": np.array(prompts, np.int32)}


def _examples(tokenizer: TextTokenizer, examples: Sequence[chat.Rendered]) -> Columns:
    masks = [np.array(example.mask, np.int8) for example in examples]
    trained = [np.flatnonzero(mask[1:]) + 1 for mask in masks]
    left_out = [sum(1 << LEFT_OUT.index(name) for name in example.left_out) for example in examples]
    by_template: Columns = {
        "straddling": np.array([example.straddling for example in examples], np.int32),
        "left_out": np.array(left_out, np.int16),
    }
    columns: Columns = by_template if tokenizer.has_template else {}
    return columns | {
        "tokens": np.concatenate([np.array(example.tokens, _dtype(tokenizer)) for example in examples]),
        "mask": np.concatenate(masks),
        "lengths": np.array([len(mask) for mask in masks], np.int32),
        "firsts": np.array([places[0] if len(places) else NEVER for places in trained], np.int32),
        "trained": np.array([len(places) for places in trained], np.int32),
    }


def _flaw(*conversations: Sequence[chat.Message]) -> int:
    """The flaw of an answer, or of the two of a pair: an index into REASONS."""
    last = [messages[-1] for messages in conversations]
    if not all(turn.get("train", True) for turn in last):
        return bad_rows.UNMARKED
    said = [chat.said_by(turn) for turn in last]
    if not all(text.strip() for text in said):
        return bad_rows.EMPTY_ANSWER
    return bad_rows.EQUAL_ANSWERS if len(set(said)) < len(said) else bad_rows.WHOLE


def _text(row: Row, where: str) -> str:
    if isinstance(row, Unreadable):
        raise row.error
    if row.get("text") is None:
        raise bad_rows.missing_columns(row, where, "this stage needs the column text")
    if not isinstance(row["text"], str):
        raise BadRow(f"{where}: text must be a string, found {row['text']!r:.40}", bad_rows.CONTENT)
    return row["text"]


def conversation_kind(loss_on: str, learn_end: bool) -> str:
    """The kind of example that an SFT stage trains on."""
    return "conversations" + ("" if loss_on == "answers" else ", all turns") + ("" if learn_end else ", without ends")


_PAIRS = Kind(_make_pair, _encode_answers, "pairs", examples_a_row=2, numbers={"margins": np.float32, "ties": np.int8})
KINDS = {
    "documents": Kind(_make_document, _encode_documents, "documents"),
    **{
        conversation_kind(loss_on, learn_end): Kind(
            _make_conversation, _encode_conversations, "conversations", Rendering(loss_on, learn_end)
        )
        for loss_on in ("answers", "all")
        for learn_end in (True, False)
    },
    "pairs": _PAIRS,
    "pairs, with margins": _PAIRS._replace(rendering=Rendering(margins=True)),
    "judged": Kind(_make_judged, _encode_answers, "judged", numbers={"labels": np.int8}),
}
