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

NEVER = np.iinfo(np.int32).max  # where an example is first trained on that never is
ENCODED_AT_ONCE = 256  # documents, or rows that are in memory, whose tokens are Python integers at the same time

Named = tuple[Row, str]  # a row, and how it is named for a person
Columns = dict[str, np.ndarray]
# Why nothing can be learned from an answer or a pair of them, by number; 0 is none.
FLAWS = ("", "with an empty answer", "with equal answers")
ANSWERED = ("firsts", "trained", "prompts", "flaws", "margins", "ties", "labels")  # columns that only some kinds have
Encode = Callable[[Tokenizer, Iterable[Named]], Columns]


class Kind(NamedTuple):
    """How rows become examples: so many a row, in these columns.

    tokens [tokens], lengths [examples]; of conversations and pairs also mask [tokens] (1 where the model learns to predict
    the token), firsts [examples] (the first such place past the first token, or NEVER) and trained [examples] (how many);
    of pairs and judged answers also prompts [examples] (where the last turn begins) and flaws [examples] (a place in FLAWS);
    of pairs margins and ties [examples], of judged answers labels [examples] (1 for a desirable one).
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
    firsts: Int[np.ndarray, " N"] | None = None
    trained: Int[np.ndarray, " N"] | None = None
    prompts: Int[np.ndarray, " N"] | None = None
    flaws: Int[np.ndarray, " N"] | None = None
    margins: Float32[np.ndarray, " N"] | None = None
    ties: Int[np.ndarray, " N"] | None = None
    labels: Int[np.ndarray, " N"] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, name: str, number: int, start: int, stop: int) -> np.ndarray:
        """Places start … stop of an example's tokens or mask; stop may lie past its end."""
        begin = int(self.starts[number])
        return self.blocks[self.parts[number]](name)[begin + start : begin + min(stop, int(self.lengths[number]))]

    def example(self, number: int, seq_len: int) -> Example:
        """An example, cut to seq_len tokens."""
        return Example(self.column("tokens", number, 0, seq_len), self.column("mask", number, 0, seq_len))

    def losses(
        self, groups: Int64[np.ndarray, "G K"], seq_len: int
    ) -> tuple[Int[np.ndarray, " G"], Int[np.ndarray, "G K"]]:
        """(tokens that a group's prompt, and that each of its answers loses at the beginning) to fit in seq_len.

        Both answers of a pair lose the same part of their prompt. Only where it is gone does an answer lose any; its
        header stays, and its end of turn if the loss is less than what is `trained`.
        """
        assert self.prompts is not None
        lengths = self.lengths[groups]
        prompt = np.clip(lengths.max(axis=1) - seq_len, 0, self.prompts[groups[:, 0]])
        return prompt, np.maximum(lengths - prompt[:, None] - seq_len, 0)

    def ends(self, group: Int64[np.ndarray, " K"], seq_len: int) -> list[Example]:
        """An answer, or the two of a pair, in at most seq_len tokens each: what `losses` says is left out."""
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
    return Store(
        blocks=blocks,
        lengths=whole("lengths"),
        parts=np.repeat(np.arange(len(lengths), dtype=np.int32), [len(some) for some in lengths]),
        starts=np.concatenate([np.cumsum(some, dtype=np.int64) - some for some in lengths]),
        **{name: whole(name) for name in ANSWERED if name in columns[0]},
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
    sides, margins, ties, flaws = [], [], [], []
    for row, where in named:
        chosen, rejected = chat.preference_messages(row, where)
        tie = chat.is_tie(row, where)
        sides += [chosen, rejected]
        margins.append(chat.margin_of(row, where))
        ties.append(tie)
        flaws.append(0 if tie else _flaw(chosen, rejected))
    of_pairs: Columns = {
        "flaws": np.array(flaws, np.int8), "margins": np.array(margins, np.float32), "ties": np.array(ties, np.int8)
    }  # fmt: skip
    return _answers(tokenizer, sides) | {name: np.repeat(column, 2) for name, column in of_pairs.items()}


def _encode_judged(tokenizer: Tokenizer, named: Iterable[Named]) -> Columns:
    """Answers with a label each, trained on."""
    judged = [chat.judged_messages(row, where) for row, where in named]
    return _answers(tokenizer, [messages for messages, _ in judged]) | {
        "flaws": np.array([_flaw(messages) for messages, _ in judged], np.int8),
        "labels": np.array([label for _, label in judged], np.int8),
    }


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


def _answers(tokenizer: Tokenizer, conversations: Sequence[Sequence[chat.Message]]) -> Columns:
    """Conversations, trained on the last turn only."""
    examples, prompts = [], []
    for messages in conversations:
        tokens, mask = chat.render(messages, tokenizer)
        start = len(tokens) - 1 - tokens[::-1].index(tokenizer.special_ids[chat.TURN_START])
        examples.append(chat.Rendered(tokens, [0] * start + mask[start:]))
        prompts.append(start)
    return _examples(tokenizer, examples) | {"prompts": np.array(prompts, np.int32)}


def _flaw(*conversations: Sequence[chat.Message]) -> int:
    """What is wrong with an answer, or the two of a pair: a place in FLAWS."""
    answers = [messages[-1]["content"] for messages in conversations]
    if not all(answer.strip() for answer in answers):
        return 1
    return 2 if len(set(answers)) < len(answers) else 0


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
