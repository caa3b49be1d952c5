"""The tokens of a source, made once: every example of every file, whole, as arrays in the cache.

What an entry holds depends on the file, the tokenizer and the kind of example, and on nothing else: holdout, seq_len,
seed and order are applied where the tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64

from lm.data import chat, readers
from lm.data.cache import Entry, Writer, current_cache
from lm.data.packing import Example
from lm.data.readers import Row
from lm.data.sources import Rows
from lm.data.tokenizer import Tokenizer
from lm.data.workers import Crew
from lm.experiment import UserError

FAULTS = {1: "of equal answers", 2: "with an empty answer"}  # why an example that was written down teaches nothing
OPTIONAL = ("firsts", "trained", "labels", "margins", "ties", "faults")  # columns that not every kind has
NEVER = np.iinfo(np.int32).max  # where an example is first trained on that never is
ENCODED_AT_ONCE = 256  # documents, or rows that are in memory, whose tokens are Python integers at the same time

Named = tuple[Row, str]  # a row, and how it is named for a person
Columns = dict[str, np.ndarray]
Encode = Callable[[Tokenizer, Iterable[Named]], Columns]


class Kind(NamedTuple):
    """How rows become examples: so many a row, in these columns.

    tokens [tokens], lengths [examples]; of conversations and pairs also mask [tokens] (1 where the model learns to predict
    the token), firsts [examples] (the first such place past the first token, or NEVER) and trained [examples] (how many);
    of judged answers also labels [examples] (1 for a desirable one); of pairs also margins and ties [examples]; of both
    faults [examples] (a key of FAULTS, or 0).
    """

    encode: Encode
    examples_a_row: int


@dataclass(frozen=True)
class Store:
    """The examples of a source by number, in the order of its rows.

    lengths, parts, starts: [examples]: how long each is, in which block it is, and where there.
    """

    blocks: Sequence[Callable[[str], np.ndarray]]
    lengths: Int[np.ndarray, " N"]
    parts: Int[np.ndarray, " N"]
    starts: Int64[np.ndarray, " N"]
    firsts: Int[np.ndarray, " N"] | None
    trained: Int[np.ndarray, " N"] | None
    labels: Int[np.ndarray, " N"] | None = None
    margins: Float32[np.ndarray, " N"] | None = None
    ties: Int[np.ndarray, " N"] | None = None
    faults: Int[np.ndarray, " N"] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, name: str, number: int, start: int, stop: int) -> np.ndarray:
        """Places start … stop of an example's tokens or mask; stop may lie past its end."""
        begin = int(self.starts[number])
        return self.blocks[self.parts[number]](name)[begin + start : begin + min(stop, int(self.lengths[number]))]

    def example(self, number: int, seq_len: int) -> Example:
        """An example, cut to seq_len tokens."""
        return Example(self.column("tokens", number, 0, seq_len), self.column("mask", number, 0, seq_len))


def store_of(rows: Rows, kind: str, tokenizer: Tokenizer) -> Store:
    """The examples of every row of a source that has an end, from the cache or made now."""
    cache = current_cache()
    made_of = {"kind": kind, "tokenizer": tokenizer.fingerprint}
    label = f"{rows.path}: tokenising"
    if not rows.parts:
        # Rows that are in memory are few.
        def build(writer: Writer) -> None:
            named = ((rows[i], rows.where(i)) for i in range(len(rows)))
            for columns in _in_pieces(named, kind, tokenizer):
                _append(writer, columns)

        return _store([cache.entry("tokens", made_of | {"content": rows.fingerprint}, build, rows.path)])
    with Crew(label, "tokens", sum(part.text_bytes for part in rows.parts), (kind, tokenizer)) as crew:

        def entry(part: Any) -> Entry:
            def build(writer: Writer) -> None:
                for size, columns in crew.map(_encode_piece, part.pieces()):
                    _append(writer, columns)
                    crew.progress.advance(size, len(columns["tokens"]))

            content = {"content": part.fingerprint, "format": part.kind}
            return cache.entry("tokens", made_of | content, build, part.name)

        return _store(crew.each(entry, rows.parts))


def store_in_memory(named: Iterable[Named], kind: str, tokenizer: Tokenizer) -> Store:
    """The examples of a few rows, which are kept nowhere."""
    pieces = list(_in_pieces(named, kind, tokenizer))
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return _assembled([columns.__getitem__], [columns])


def _store(entries: Sequence[Entry]) -> Store:
    names = [name for name in entries[0].files if name not in ("tokens", "mask")]
    columns = [{name: entry.span(name, 0, entry.length(name)) for name in names} for entry in entries]
    return _assembled([entry.array for entry in entries], columns)


def _assembled(blocks: Sequence[Callable[[str], np.ndarray]], columns: Sequence[Mapping[str, np.ndarray]]) -> Store:
    def whole(name: str) -> np.ndarray:
        return np.concatenate([one[name] for one in columns])

    lengths = [one["lengths"] for one in columns]
    some = {name: whole(name) for name in OPTIONAL if name in columns[0]}
    return Store(
        blocks=blocks,
        lengths=whole("lengths"),
        parts=np.repeat(np.arange(len(lengths), dtype=np.int32), [len(own) for own in lengths]),
        starts=np.concatenate([np.cumsum(own, dtype=np.int64) - own for own in lengths]),
        **dict.fromkeys(("firsts", "trained")) | some,
    )


def _append(writer: Writer, columns: Columns) -> None:
    for name, values in columns.items():
        writer.append(name, values)


def _in_pieces(named: Iterable[Named], kind: str, tokenizer: Tokenizer) -> Iterator[Columns]:
    todo = iter(named)
    while some := list(islice(todo, ENCODED_AT_ONCE)):
        yield KINDS[kind].encode(tokenizer, some)


def _encode_piece(shared: tuple[str, Tokenizer], piece: readers.Piece) -> tuple[int, Columns]:
    """(bytes of text, columns) of a piece of a file."""
    kind, tokenizer = shared
    named = ((row, piece.where(place)) for place, row in enumerate(readers.read(piece)))
    return piece.text_bytes, KINDS[kind].encode(tokenizer, named)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def _encode_documents(tokenizer: Tokenizer, named: Iterable[Named]) -> Columns:
    """Documents, an end-of-text token before and after each."""
    dtype, pad = _dtype(tokenizer), tokenizer.pad_id
    pieces: list[np.ndarray] = []
    todo = (_text(row, where) for row, where in named)
    while some := list(islice(todo, ENCODED_AT_ONCE)):
        pieces += [np.array([pad, *ids, pad], dtype) for ids in tokenizer.encode_batch(some)]
    return {"tokens": np.concatenate(pieces), "lengths": np.array([len(piece) for piece in pieces], np.int32)}


def _encode_conversations(tokenizer: Tokenizer, named: Iterable[Named]) -> Columns:
    """Conversations, trained on the assistant's turns."""
    examples = [chat.render(chat.training_messages(row, where), tokenizer) for row, where in named]
    return _examples(tokenizer, examples)


def _encode_pairs(tokenizer: Tokenizer, named: Iterable[Named]) -> Columns:
    """Preference pairs, the chosen conversation and then the rejected, trained on the last answer."""
    examples, margins, ties, faults = [], [], [], []
    for row, where in named:
        both = chat.preference_messages(row, where)
        examples += [_last_answer(side, tokenizer) for side in both]
        margin, tie = chat.preference_marks(row, where)
        margins += 2 * [margin]
        ties += 2 * [tie]
        faults += 2 * [_fault([side[-1]["content"].strip() for side in both])]
    columns = {"margins": (margins, np.float32), "ties": (ties, np.int8), "faults": (faults, np.int8)}
    return _examples(tokenizer, examples) | {name: np.array(found, kind) for name, (found, kind) in columns.items()}


def _fault(answers: Sequence[str]) -> int:
    """The number in FAULTS of what is wrong with the answers to one prompt; 0 for nothing."""
    if not all(answers):
        return 2
    return int(len(answers) > 1 and len(set(answers)) == 1)


def _encode_judged(tokenizer: Tokenizer, named: Iterable[Named]) -> Columns:
    """Answers with a label each, trained on."""
    judged = [chat.judged_messages(row, where) for row, where in named]
    examples = [_last_answer(messages, tokenizer) for messages, _ in judged]
    faults = [_fault([messages[-1]["content"].strip()]) for messages, _ in judged]
    labels = [label for _, label in judged]
    return _examples(tokenizer, examples) | {"labels": np.array(labels, np.int8), "faults": np.array(faults, np.int8)}


def _examples(tokenizer: Tokenizer, examples: Sequence[chat.Rendered]) -> Columns:
    masks = [np.array(example.mask, np.int8) for example in examples]
    trained = [np.flatnonzero(mask[1:]) + 1 for mask in masks]
    return {
        "tokens": np.concatenate([np.array(example.tokens, _dtype(tokenizer)) for example in examples]),
        "mask": np.concatenate(masks),
        "lengths": np.array([len(mask) for mask in masks], np.int32),
        "firsts": np.array([places[0] if len(places) else NEVER for places in trained], np.int32),
        "trained": np.array([len(places) for places in trained], np.int32),
    }


def _last_answer(messages: list[dict[str, str]], tokenizer: Tokenizer) -> chat.Rendered:
    """The conversation rendered, its mask kept on the last turn only."""
    tokens, mask = chat.render(messages, tokenizer)
    start = len(tokens) - 1 - tokens[::-1].index(tokenizer.special_ids[chat.TURN_START])
    return chat.Rendered(tokens, [0] * start + mask[start:])


def _text(row: Row, where: str) -> str:
    if "text" not in row:
        raise UserError(f"{where}: this stage needs the column text; the columns found are {', '.join(row)}")
    if not isinstance(row["text"], str):
        raise UserError(f"{where}: text must be a string, found {row['text']!r:.40}")
    return row["text"]


KINDS = {
    "documents": Kind(_encode_documents, 1),
    "conversations": Kind(_encode_conversations, 1),
    "pairs": Kind(_encode_pairs, 2),
    "judged": Kind(_encode_judged, 1),
}
