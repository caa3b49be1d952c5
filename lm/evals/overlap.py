"""Contamination: which items of a benchmark share n-grams of words with the training data.

As in GPT-3 (Brown et al. 2020, appendix C) texts are compared in small letters and without punctuation, and an item is
contaminated if any of its n-grams, of 13 words unless told otherwise, is in the training data. An item that is shorter counts with all of
its words as one n-gram, if it has at least LEAST. Training data is read once, in batches, and never kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from lm.between_batches import between_batches
from lm.data.bad_rows import Unreadable
from lm.data.readers import Row, read
from lm.data.sources import Rows, rows_of, split_rows, texts_of
from lm.data.split import Places
from lm.experiment import COLLECTED, Source

WORDS = 13
LEAST = 8  # words of an item that is compared; fewer are in too many texts that have nothing to do with it
BATCH_BYTES = 1 << 20  # of training text that are compared together
GENERATED_ROWS = 20_000  # that are compared of a generator, which has no end
SHOWN = 5  # examples
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
BREAK = b" \x01 "  # a word between two texts, which no text has
OTHERS = re.compile(r"[^\w\x00-\x7f]+")  # beyond ASCII; in it everything but letters and digits is between words
BETWEEN = bytes(byte if chr(byte).isalnum() or byte > 127 or byte == 1 else 32 for byte in range(256))
WITHOUT_SPACES = re.compile(
    r"([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff])"
)  # scripts that write no spaces: a letter is a word


Place = tuple[Rows, int]
"""A training row: its source, and its index."""


class Overlap(NamedTuple):
    """An item's number of different n-grams, how many are in the training data, and one of these with a place that has it."""

    grams: int
    found: int
    text: str = ""
    where: str = ""

    @property
    def share(self) -> float:
        return self.found / self.grams if self.grams else 0.0


@dataclass(frozen=True)
class Contamination:
    """The overlap of each item, in order, by n-grams of `words` words; `read` bytes of normalised training text were compared."""

    items: list[Overlap]
    words: int
    read: int

    @property
    def compared(self) -> int:
        """Items that are long enough."""
        return sum(item.grams > 0 for item in self.items)

    @property
    def contaminated(self) -> int:
        """Items of which an n-gram was found."""
        return sum(item.found > 0 for item in self.items)

    @property
    def share(self) -> float:
        """Share of the n-grams of all items that were found."""
        return sum(item.found for item in self.items) / max(1, sum(item.grams for item in self.items))

    def describe(self) -> str:
        """A line of counts."""
        short = len(self.items) - self.compared
        return (
            f"{self.contaminated:,} of {self.compared:,} items share {self.words}-grams with the training data, {self.share:.1%} of all "
            f"n-grams" + (f"; {short:,} items are too short to tell" if short else "")
        )

    def examples(self) -> list[str]:
        """The items with the largest share, with a common n-gram and a place where it stands."""
        found = sorted(enumerate(self.items), key=lambda pair: -pair[1].share)
        return [f"item {i}: {one.share:.0%}: {one.text!r} in {one.where}" for i, one in found[:SHOWN] if one.found]


def normalised(text: str) -> bytes:
    """A text in small letters with spaces in place of punctuation."""
    text = text.lower()
    if not text.isascii():
        text = WITHOUT_SPACES.sub(r" \1 ", OTHERS.sub(" ", text))
    return text.encode(errors="replace").translate(BETWEEN)


def item_texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of an item: in the layouts of choices the question with the right one, in other rows every text."""
    gold, choices = row.get("gold"), row.get("choices") or row.get("context_options")
    if isinstance(choices, list) and type(gold) is int and 0 <= gold < len(choices):
        return [f"{row['query']} {choices[gold]}" if "query" in row else f"{choices[gold]} {row.get('continuation')}"]
    if "good" in row and "bad" in row:
        return [str(row["good"])]
    if "context" in row and "continuation" in row:
        return [f"{row['context']} {row['continuation']}"]
    return list(_texts_in(row))


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


def overlaps(
    items: Sequence[Sequence[str]], sources: Sequence[Source], elsewhere: Places, words: int = WORDS
) -> Contamination:
    """Compare items, each some texts, with the training rows of sources.

    Args:
        elsewhere: keys that other sources hold out (`held_out_elsewhere`), which are not trained on.
        words: length of the n-grams; items of fewer words are compared as a whole, if they have LEAST.
    """
    grams = [_grams_of(texts, words) for texts in items]
    index = _Index(grams)
    size = 0
    for data, starts, rows in _batches(sources, elsewhere):
        between_batches()
        index.search(data, starts, rows)
        size += len(data)
    return Contamination([index.overlap(one) for one in grams], words, size)


class _Grams(NamedTuple):
    """An item's words, the length of its n-grams, and the different hashes of these with the word at which each begins."""

    words: list[str]
    length: int
    hashes: UInt64[np.ndarray, " N"]
    firsts: Int[np.ndarray, " N"]


def _grams_of(texts: Sequence[str], most: int) -> _Grams:
    said = [normalised(text).decode().split() for text in texts]
    length = min(most, max(map(len, said), default=0))
    words = [word for one in said for word in one]
    if length < min(most, LEAST):
        return _Grams(words, length, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    hashes, _ = _word_hashes(np.frombuffer(" ".join(words).encode(), np.uint8))
    ends = np.cumsum([len(one) for one in said])
    places = np.concatenate([np.arange(end - len(one), end - length + 1) for one, end in zip(said, ends, strict=True)])
    found, firsts = np.unique(_combined(*_prefix_sums(hashes), length)[places], return_index=True)
    return _Grams(words, length, found, places[firsts])


class _Index:
    """The n-grams of all items, and which of them have been found, each with the first place."""

    def __init__(self, grams: Sequence[_Grams]):
        self.lengths = sorted({one.length for one in grams if len(one.hashes)})
        every = [one.hashes for one in grams]
        self.hashes = np.unique(np.concatenate(every)) if every else np.zeros(0, np.uint64)
        self.found = np.zeros(len(self.hashes), bool)
        self.where: dict[int, str] = {}
        # Almost no n-gram of the training data is one of an item: one bit for each value of the first bits tells most apart.
        self.bits = max(16, int(np.ceil(np.log2(max(1, len(self.hashes))))) + 5)
        self.first = np.zeros(1 << self.bits, bool)
        self.first[self.hashes >> np.uint64(64 - self.bits)] = True

    def search(self, data: UInt8[np.ndarray, " B"], starts: Sequence[int], rows: Sequence[Place]) -> None:
        """Mark the n-grams that normalised text has; `starts` are the bytes at which the texts of the rows begin."""
        words, begins = _word_hashes(data)
        sums = _prefix_sums(words)
        for length in self.lengths:
            hashes = _combined(*sums, length)
            near = np.flatnonzero(self.first[hashes >> np.uint64(64 - self.bits)])
            places = np.searchsorted(self.hashes, hashes[near])
            places[places == len(self.hashes)] = 0
            hits = self.hashes[places] == hashes[near]
            new, which = np.unique(places[hits], return_index=True)
            fresh = ~self.found[new]
            for place, word in zip(new[fresh], near[hits][which[fresh]], strict=True):
                source, row = rows[int(np.searchsorted(starts, begins[word], side="right")) - 1]
                self.where[int(self.hashes[place])] = source.where(row)
            self.found[new] = True

    def overlap(self, one: _Grams) -> Overlap:
        """What has been found of an item."""
        hits = np.flatnonzero(self.found[np.searchsorted(self.hashes, one.hashes)])
        if not len(hits):
            return Overlap(len(one.hashes), 0)
        text = " ".join(one.words[one.firsts[hits[0]] :][: one.length])
        return Overlap(len(one.hashes), len(hits), text, self.where[int(one.hashes[hits[0]])])


def _word_hashes(data: UInt8[np.ndarray, " B"]) -> tuple[UInt64[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """A hash of each word of normalised text, and the byte at which it begins."""
    inside = np.concatenate([[False], data != 32, [False]])
    begins, ends = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2).T
    sums, powers = _prefix_sums(data.astype(np.uint64) + np.uint64(1))
    hashes = (sums[ends] - sums[begins]) * powers[begins]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(32)), begins


def _combined(
    sums: UInt64[np.ndarray, " N"], powers: UInt64[np.ndarray, " N"], length: int
) -> UInt64[np.ndarray, " M"]:
    """A hash of each n-gram of this length, by the prefix sums of the hashes of the words."""
    count = max(0, len(sums) - length)
    hashes = (sums[length : length + count] - sums[:count]) * powers[:count]
    hashes ^= hashes >> np.uint64(31)
    return hashes * np.uint64(0x94D049BB133111EB)


def _prefix_sums(values: UInt64[np.ndarray, " N"]) -> tuple[UInt64[np.ndarray, " M"], UInt64[np.ndarray, " M"]]:
    """Sums modulo 2^64 of values[i] * BASE^i before each place, and BASE^-place, which moves a difference of them to place 0."""
    size = len(values) + 1
    powers, inverses = _powers(size)
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers[:-1], dtype=np.uint64)]), inverses


_kept: dict[int, UInt64[np.ndarray, " N"]] = {}


def _powers(size: int) -> tuple[UInt64[np.ndarray, " N"], UInt64[np.ndarray, " N"]]:
    for base in (BASE, INVERSE):
        if len(_kept.get(base, ())) < size:
            room = 1 << (size - 1).bit_length()
            _kept[base] = np.concatenate([[np.uint64(1)], np.full(room - 1, base, np.uint64)]).cumprod(dtype=np.uint64)
    return _kept[BASE][:size], _kept[INVERSE][:size]


def _batches(
    sources: Sequence[Source], elsewhere: Places
) -> Iterator[tuple[UInt8[np.ndarray, " B"], list[int], list[Place]]]:
    """Normalised texts of the training rows as bytes, the byte at which each text begins, and the row that has it."""
    parts: list[bytes] = []
    starts: list[int] = []
    places: list[Place] = []
    size = 0
    for row, place in _training_rows(sources, elsewhere):
        for text in texts_of(row):
            for start in range(0, len(text), BATCH_BYTES):  # a document may be longer than a batch
                parts.append(normalised(text[start : start + BATCH_BYTES].replace("\x01", " ")) + BREAK)
                starts.append(size)
                places.append(place)
                size += len(parts[-1])
        if size > BATCH_BYTES:
            yield np.frombuffer(b"".join(parts), np.uint8), starts, places
            parts, starts, places, size = [], [], [], 0
    if parts:
        yield np.frombuffer(b"".join(parts), np.uint8), starts, places


def _training_rows(sources: Sequence[Source], elsewhere: Places) -> Iterator[tuple[Row, Place]]:
    """The rows that sources train on, in the order of the files."""
    for source in dict.fromkeys(sources):
        if source.weight > 0 and not source.path.startswith(COLLECTED):
            rows = rows_of(source)
            train, _ = split_rows(rows, source.holdout, elsewhere)
            for index, row in _rows_at(rows, train):
                if not isinstance(row, Unreadable):
                    yield row, (rows, index)


def _rows_at(rows: Rows, indices: Sequence[int]) -> Iterable[tuple[int, Row]]:
    if not rows.parts:
        return ((indices[i], rows[indices[i]]) for i in range(min(len(indices), GENERATED_ROWS)))
    chosen = np.zeros(len(rows), bool)
    chosen[np.asarray(indices, np.int64)] = True
    every = (row for part in rows.parts for piece in part.pieces() for row in read(piece))
    return ((index, row) for index, row in enumerate(every) if chosen[index])
