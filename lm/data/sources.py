"""Where rows come from: a path becomes random access to dicts, and a hash says which of them are held out.

A file is read through once; where its rows begin and on which side they are is kept in the cache.

Paths: `.txt`, `.jsonl`, `.jsonl.gz`, `.parquet`, a folder of these, `tfds:NAME/SPLIT`, `gen:NAME`. Rows as people
have them: {"text"}; {"messages"}; {"prompt", "chosen", "rejected"}; {"question", "answer"}; more columns do no harm.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int64

from lm.data import curriculum, python_docs, readers, tfds_rows
from lm.data.cache import Cache, Entry, Writer, current_cache
from lm.data.readers import FILES, FORMATS, Piece, Row, cut_text
from lm.data.split import TEXT_COLUMNS, Places, canonical_json, split_key, split_place
from lm.data.workers import Crew
from lm.experiment import MADE, UserError

__all__ = [
    "Measures",
    "Part",
    "Row",
    "Rows",
    "cut_text",
    "load_rows",
    "split_key",
    "split_place",
    "split_rows",
    "texts_of",
    "why_missing",
]

PROBED = 256  # rows of a generator that its fingerprint is taken over
STRIDE = 16  # generated rows from which one training example is taken: the first that is not held out
SEARCHED = 100_000  # generated rows looked through for held-out ones
HELDOUT_GENERATED = 500  # held-out rows taken from a generator
NOWHERE: Places = np.zeros(0)  # no key is held out by another source


class Measures(NamedTuple):
    """Of every row: its place in the split, how many texts it has to train on, and their characters."""

    places: Places
    texts: Int64[np.ndarray, " N"]
    characters: Int64[np.ndarray, " N"]


@dataclass(frozen=True)
class Part:
    """The rows of one file, by what the cache knows of it. `file` is what is read: it may be the unpacked one."""

    name: str
    file: Path
    kind: str
    entry: Entry
    fingerprint: str

    def __len__(self) -> int:
        return self.entry.length("spans")

    @property
    def text_bytes(self) -> int:
        """About how much there is to read, unpacked."""
        return int(self.entry.array("spans")[:, 1].sum()) if self.kind == ".parquet" else self.file.stat().st_size

    def piece(self, start: int, stop: int) -> Piece:
        return Piece(self.name, self.file, self.kind, start, np.array(self.entry.array("spans")[start:stop]))

    def pieces(self) -> Iterator[Piece]:
        """All rows, in pieces to work on."""
        for start in range(0, len(self), readers.SPANS):
            many = self.piece(start, min(start + readers.SPANS, len(self)))
            for low, high in readers.cuts(many.spans, self.kind):
                yield many._replace(first=start + low, spans=many.spans[low:high])


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Random access to the rows of a source. `where(i)` names row i for a person; `generated` rows are made on demand.

    `parts` are the files that they are in, one after another; none of rows that are in memory or generated.
    """

    path: str
    length: int
    fetch: Callable[[int], Row]
    fingerprint: str
    where: Callable[[int], str]
    generated: bool = False
    parts: tuple[Part, ...] = ()

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self.fetch(i) for i in range(*index.indices(self.length))]
        if not 0 <= index < self.length:
            raise IndexError(f"{self.path} has no row {index}")
        return self.fetch(index)

    @functools.cached_property
    def measures(self) -> Measures:
        """What is known of every row of a source that has an end; of files by the cache, without reading them."""
        if not self.parts:
            return _measure(self)
        columns = [[part.entry.array(name) for part in self.parts] for name in Measures._fields]
        return Measures(*(found[0] if len(found) == 1 else np.concatenate(found) for found in columns))


def load_rows(path: str, data_dir: str | Path | None = None) -> Rows:
    """The rows of a source. `data_dir` is where TFDS keeps its data, by default where TFDS itself does.

    Raises UserError for what is missing, unknown, empty or broken, naming file and line.
    """
    if path.startswith("gen:"):
        return _generated(path)
    if path.startswith("tfds:"):
        return _read_tfds(path, data_dir)
    if missing := why_missing(path):
        raise UserError(missing)
    file = Path(path).expanduser()
    return _read_files([(str(f), f) for f in _files(file, path)] if file.is_dir() else [(path, file)], path)


def split_rows(rows: Rows, holdout: float, elsewhere: Places = NOWHERE) -> tuple[Sequence[int], Sequence[int]]:
    """(training indices, held-out indices): a row is held out iff the hash of what it asks is below `holdout`.

    So a row's side depends on nothing but itself: not on its place, the process or the other rows. Held-out indices come
    in the order of the hash. Of a generator the training indices have no end for practical purposes, and the held-out
    ones are the first few hundred of different keys; both are found when asked for. Rows of `elsewhere`, which another
    source holds out, are on neither side unless this source holds them out too.
    """
    if not 0.0 <= holdout <= 1.0:
        raise UserError(f"{rows.path}: holdout is {holdout}; it is the part of the rows held out, from 0 to 1")
    if rows.generated:
        training = _Training(rows, holdout, frozenset(elsewhere.tolist())) if holdout < 1 else ()
        return training, (_HeldOut(rows, holdout) if holdout > 0 else ())
    places = rows.measures.places
    held_out = np.flatnonzero(places < holdout)
    train: Any = np.flatnonzero((places >= holdout) & ~np.isin(places, elsewhere))
    ordered: Any = held_out[np.argsort(places[held_out], kind="stable")]
    return train, ordered


def _measure(rows: Iterable[Row]) -> Measures:
    found = [(split_place(split_key(row)), texts_of(row)) for row in rows]
    return Measures(
        np.array([place for place, _ in found], np.float64),
        np.array([len(texts) for _, texts in found], np.int64),
        np.array([sum(map(len, texts)) for _, texts in found], np.int64),
    )


def _measure_piece(_: None, piece: Piece) -> tuple[Piece, Measures]:
    return piece, _measure(readers.read(piece))


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Every text of a row that a stage may train on."""
    found: list[Any] = []
    for column in TEXT_COLUMNS:
        value = row.get(column)
        turns = value if isinstance(value, list) else [{"content": value}]
        found += [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    return [text for text in found if isinstance(text, str)]


class _Training(Sequence[int]):
    """Index k is the first generated row from k * STRIDE on that is not held out, here or elsewhere."""

    def __init__(self, rows: Rows, holdout: float, elsewhere: frozenset[float]):
        self._rows, self._holdout, self._elsewhere = rows, holdout, elsewhere

    def __len__(self) -> int:
        return len(self._rows) // STRIDE

    def __getitem__(self, place):  # type: ignore[override]
        if not 0 <= place < len(self):
            raise IndexError(f"no training example {place}")
        for index in range(place * STRIDE, min(place * STRIDE + SEARCHED, len(self._rows))):
            place_in_split = split_place(split_key(self._rows[index]))
            if place_in_split >= self._holdout and place_in_split not in self._elsewhere:
                return index
        raise UserError(f"{self._rows.path}: holdout {self._holdout} leaves nothing for training; lower it")


class _HeldOut(Sequence[int]):
    """The held-out ones among the first generated rows, each key once; looked for when first asked for."""

    def __init__(self, rows: Rows, holdout: float):
        self._rows, self._holdout = rows, holdout

    @property
    def _found(self) -> tuple[int, ...]:
        return _search_held_out(self._rows.path, self._holdout)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, place):  # type: ignore[override]
        return self._found[place]


@functools.lru_cache(maxsize=16)
def _search_held_out(path: str, holdout: float) -> tuple[int, ...]:
    rows = load_rows(path)
    found: dict[str, int] = {}
    for index in range(SEARCHED):
        key = split_key(rows[index])
        if split_place(key) < holdout:
            found.setdefault(key, index)
            if len(found) == HELDOUT_GENERATED:
                break
    return tuple(found.values())


@functools.cache
def _generated(path: str) -> Rows:
    name = path.removeprefix("gen:")
    if name == "docs":
        return _in_memory(path, _documents(), python_docs.fingerprint(_documents()))
    if name == "drills":
        drills = [curriculum.drill_row(index) for index in range(curriculum.DRILLS)]
        return _in_memory(path, drills, hashlib.sha256(canonical_json(drills).encode()).hexdigest())
    if name not in GENERATORS:
        names = ["docs", "drills", *GENERATORS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean gen:{near[0]}?" if near else f"there are {', '.join(f'gen:{n}' for n in names)}"
        raise UserError(f"{path}: there is no such generator; {hint}")
    make = functools.lru_cache(maxsize=64)(GENERATORS[name])  # the split looks at a row before it is used
    digest = hashlib.sha256(canonical_json([make(index) for index in range(PROBED)]).encode())
    return Rows(path, curriculum.LENGTH, make, digest.hexdigest(), lambda i: f"{path} row {i}", generated=True)


@functools.lru_cache(maxsize=1)
def _documents() -> tuple[Row, ...]:
    """`python_docs.documents()`, which takes seconds, or what it gave before of the same Python."""

    def build(writer: Writer) -> None:
        writer.append("rows", np.frombuffer(json.dumps(python_docs.documents()).encode(), np.uint8))

    entry = current_cache().entry("documents", python_docs.made_of(), build, "the documents of Python's own library")
    return tuple(json.loads(entry.path("rows").read_bytes()))


GENERATORS: dict[str, Callable[[int], Row]] = {
    "instruct": curriculum.instruct_row,
    "arithmetic": curriculum.arithmetic_row,
    "preferences": curriculum.preference_row,
    "chains": curriculum.chain_row,
}


def _files(folder: Path, path: str) -> list[Path]:
    """Every file in it that has one of our endings, by name."""
    files = sorted(file for file in folder.iterdir() if readers.kind_of(file) and file.is_file())
    if not files:
        raise UserError(f"{path}: there is no {', '.join(FILES)} file in this folder")
    return files


def _read_files(files: Sequence[tuple[str, Path]], path: str) -> Rows:
    """The rows of files, one file after another; `files` are names for people, and paths."""
    cache = current_cache()
    with Crew(f"{path}: reading", "rows", sum(file.stat().st_size for _, file in files)) as crew:
        parts = crew.each(lambda named: _read_file(*named, cache, crew), files)
    whole = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    return _of_parts(path, parts, parts[0].fingerprint if files[0][0] == path else whole)


def _read_file(name: str, file: Path, cache: Cache, crew: Crew) -> Part:
    kind = readers.kind_of(file)
    if kind is None:
        raise UserError(
            f"{name}: cannot read this kind of file; a source is {', '.join(FILES)}, a folder of these, "
            "tfds:NAME/SPLIT or gen:NAME"
        )
    content = cache.digest(file)

    def build(writer: Writer) -> None:
        _index(writer, name, file, kind, FORMATS[kind].unpack(name, file), crew)

    entry = cache.entry("rows", {"content": content, "format": kind}, build, name)
    return _part(name, file, kind, entry, content)


def _read_tfds(path: str, data_dir: str | Path | None) -> Rows:
    """The rows of a TFDS split, unpacked as JSON lines; the fingerprint is over these."""
    cache = current_cache()
    files, lines = tfds_rows.find(path.removeprefix("tfds:"), data_dir)

    def build(writer: Writer) -> None:
        _index(writer, path, files[0], "tfds", lines(), crew)

    with Crew(f"{path}: reading", "rows", sum(file.stat().st_size for file in files)) as crew:
        made_of = {"content": [cache.digest(file) for file in files], "format": "tfds"}
        entry = cache.entry("rows", made_of, build, path)
    return _of_parts(path, [_part(path, files[0], "tfds", entry, entry.files["unpacked"]["sha256"])], None)


def _index(writer: Writer, name: str, file: Path, kind: str, unpacked: Iterator[bytes] | None, crew: Crew) -> None:
    """Write down where the rows of a file begin, and the measures of each."""
    if unpacked is not None:
        for block in unpacked:
            writer.append("unpacked", np.frombuffer(block, np.uint8))
        packed, file, kind = file, writer.flushed("unpacked"), _kind_unpacked(kind)
        crew.progress.expect(file.stat().st_size - packed.stat().st_size)
    count = 0

    def pieces() -> Iterator[Piece]:
        first = 0
        for spans in FORMATS[kind].locate(name, file):
            for low, high in readers.cuts(spans, kind):
                yield Piece(name, file, kind, first + low, spans[low:high])
            first += len(spans)

    for piece, found in crew.map(_measure_piece, pieces()):
        writer.append("spans", piece.spans)
        for column, values in zip(Measures._fields, found, strict=True):
            writer.append(column, values)
        crew.progress.advance(piece.text_bytes, len(piece.spans))
        count += len(piece.spans)
    if count == 0:
        raise UserError(f"{name}: empty, there is not one row in it")


def _part(name: str, file: Path, kind: str, entry: Entry, fingerprint: str) -> Part:
    if "unpacked" in entry.files:
        file, kind = entry.path("unpacked"), _kind_unpacked(kind)
    return Part(name, file, kind, entry, fingerprint)


def _kind_unpacked(kind: str) -> str:
    return FORMATS[kind].unpacked


def _of_parts(path: str, parts: Sequence[Part], fingerprint: str | None) -> Rows:
    bounds = np.cumsum([0, *map(len, parts)])

    def find(index: int) -> tuple[Part, int]:
        number = int(np.searchsorted(bounds, index, side="right")) - 1
        return parts[number], index - int(bounds[number])

    def fetch(index: int) -> Row:
        part, place = find(index)
        return next(readers.read(part.piece(place, place + 1)))

    def where(index: int) -> str:
        part, place = find(index)
        return part.piece(place, place + 1).where(0)

    own = fingerprint or parts[0].fingerprint
    return Rows(path, int(bounds[-1]), fetch, own, where, parts=tuple(parts))


def _in_memory(path: str, rows: Sequence[Row], fingerprint: str) -> Rows:
    return Rows(path, len(rows), rows.__getitem__, fingerprint, lambda i: f"{path} row {i}")


def why_missing(path: str) -> str | None:
    """One line that says that the file of a source is not there, and what is; None for what is no file or is there."""
    file = Path(path).expanduser()
    if path.startswith(("gen:", "tfds:", MADE)) or file.exists():
        return None
    if not file.parent.is_dir():
        return f"{path}: there is no folder {file.parent}"
    names = [entry.name for entry in file.parent.iterdir() if entry.name.endswith(FILES)]
    near = difflib.get_close_matches(file.name, names, n=3)
    found = ", ".join(sorted(names)[:5]) or f"no {', '.join(FILES)}"
    hint = f"did you mean {' or '.join(near)}?" if near else f"{file.parent.resolve()} has {found}"
    return f"{path}: there is no such file; {hint}"
