"""Sources of rows: random access to the rows of a path, and their split into training and held-out rows by a hash.

A file is read once from start to end; the offsets of its rows and their places in the split are cached.

Paths: `.txt`, `.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`, a folder of these, a folder of a data set
(`lm.data.dataset_folder`), `tfds:NAME/SPLIT`, `gen:NAME`, `gym:NAME`.
`lm.data.layouts` lists the column layouts that are read; other columns are ignored and named once.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int64

from lm.data import curriculum, dataset_folder, gym, python_docs, readers, tfds_rows
from lm.data.bad_rows import Unreadable, with_advice
from lm.data.cache import Cache, Entry, Writer, current_cache
from lm.data.columnar import KINDS
from lm.data.layouts import canonical
from lm.data.readers import FILES, FORMATS, Piece, Row
from lm.data.split import TEXT_COLUMNS, Places, canonical_json, split_key, split_place
from lm.data.workers import WorkerPool
from lm.experiment import COLLECTED, Source, UserError, nearest

PROBED = 256  # rows of a generator that its fingerprint covers
STRIDE = 16  # generated rows per training example: the first of them that is not held out
SEARCHED = 100_000  # generated rows searched for held-out rows
GENERATED = ("gen:", "gym:")  # beginnings of the paths of generated rows
NO_SPANS = np.zeros((0, 3), np.int64)
HELDOUT_GENERATED = 500  # held-out rows taken from a generator
NOWHERE: Places = np.zeros(0)  # no key is held out by another source


class Measures(NamedTuple):
    """For every row: its place in the split, the number of its training texts, and their characters."""

    places: Places
    texts: Int64[np.ndarray, " N"]
    characters: Int64[np.ndarray, " N"]


@dataclass(frozen=True)
class Part:
    """The rows of one file, as indexed in the cache. `file` is the file to read, which may be the unpacked copy."""

    name: str
    file: Path
    kind: str
    entry: Entry
    fingerprint: str
    packed: str  # the kind of the file before it was unpacked
    columns: tuple[str, ...] = ()
    drop: bool = False

    def __len__(self) -> int:
        return self.entry.length("spans")

    @property
    def text_bytes(self) -> int:
        """Approximate size of the unpacked text in bytes."""
        return int(self.entry.array("spans")[:, 1].sum()) if self.kind in KINDS else self.file.stat().st_size

    def piece(self, start: int, stop: int) -> Piece:
        spans = np.array(self.entry.array("spans")[start:stop])
        return Piece(self.name, self.file, self.kind, start, spans, self.columns, self.drop)

    def pieces(self, smaller: int = 1) -> Iterator[Piece]:
        """All rows, in pieces of about PIECE_BYTES / `smaller`."""
        for start in range(0, len(self), readers.SPANS):
            many = self.piece(start, min(start + readers.SPANS, len(self)))
            for low, high in readers.cuts(many.spans, self.kind, smaller):
                yield many._replace(first=start + low, spans=many.spans[low:high])


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Random access to the rows of a source. `where(i)` locates row i in messages; `generated` rows are made on demand.

    `parts` are its files, in order; none for rows in memory or generated. `columns` and
    `drop` are those of `load_rows`; `notes` say which files of a folder are not read.
    """

    path: str
    length: int
    fetch: Callable[[int], Row]
    fingerprint: str
    where: Callable[[int], str]
    generated: bool = False
    parts: tuple[Part, ...] = ()
    columns: tuple[str, ...] = ()
    drop: bool = False
    notes: tuple[str, ...] = ()

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

    def reading(self) -> dict[str, Any]:
        """The reading options that change rows, as part of cache keys."""
        return _reading(self.columns, self.drop)

    @functools.cached_property
    def measures(self) -> Measures:
        """Measures of every row of a finite source; of files from the cache, without reading them."""
        if not self.parts:
            return _measure(self)
        columns = [[part.entry.array(name) for part in self.parts] for name in Measures._fields]
        return Measures(*(found[0] if len(found) == 1 else np.concatenate(found) for found in columns))


def load_rows(path: str, data_dir: str | Path | None = None, columns: tuple[str, ...] = (), drop: bool = False) -> Rows:
    """Open the rows of a source.

    Args:
        data_dir: TFDS's data folder; None: TFDS's default.
        columns: columns to rename, as ours=theirs.
        drop: return rows that cannot be read as `Unreadable` instead of raising.

    Raises:
        UserError: a missing, unknown, empty or broken file; names file and line.
    """
    readers.names_of(columns)
    if path.startswith(GENERATED):
        rows = _generated(path)
        if columns:
            return replace(rows, fetch=lambda i: _renamed(rows.fetch(i), columns), columns=columns, drop=drop)
        return replace(rows, drop=True) if drop else rows
    if path.startswith("tfds:"):
        return _check_columns(_read_tfds(path, data_dir, columns, drop))
    if missing := why_missing(path):
        raise UserError(missing)
    file, found = Path(path).expanduser(), dataset_folder.find(path)
    if found:
        for why in filter(None, map(readers.why_not_a_file, map(str, found.files))):
            raise UserError(why)
        named = [(str(f), f) for f in found.files]
        notes: tuple[str, ...] = (
            (f"the rows of {found.name}; not read: {', '.join(found.others)}",) if found.others else ()
        )
    elif file.is_dir():
        files, notes = _files(file, path)
        named = [(str(f), f) for f in files]
    else:
        named, notes = [(path, file)], ()
    rows = _read_files(named, path, columns, drop)
    return _check_columns(replace(rows, notes=(*notes, *rows.notes, *_bytes_notes(rows))))


def _bytes_notes(rows: Rows) -> Iterator[str]:
    """A line on the columns of bytes in the files, which are not read."""
    empty = (part.piece(0, 0) for part in rows.parts)
    if names := dict.fromkeys(name for piece in empty for name in readers.bytes_columns(piece)):
        yield f"columns of images, audio or other bytes are not read: {', '.join(names)}"


def rows_of(source: Source) -> Rows:
    """The rows of a configured source: columns renamed, bad rows handled as configured."""
    with with_advice():
        return load_rows(source.path, columns=source.columns, drop=source.bad_rows == "drop")


def _renamed(row: Row, columns: tuple[str, ...]) -> Row:
    return readers.renamed(row, readers.names_of(columns))


def _reading(columns: tuple[str, ...], drop: bool) -> dict[str, Any]:
    return ({"columns": list(columns)} if columns else {}) | ({"bad_rows": "drop"} if drop else {})


def _check_columns(rows: Rows) -> Rows:
    """Raises UserError for a column to rename that no row has."""
    missing, found = set(readers.names_of(rows.columns)), dict[str, None]()
    if not missing:
        return rows
    for part in rows.parts:
        for piece in part.pieces():
            for row in readers.read(piece._replace(columns=())):
                found |= dict.fromkeys(map(str, row))
                missing -= set(row)
                if not missing:
                    return rows
    raise UserError(
        f"{rows.path}: columns names {sorted(missing)[0]!r:.60}, which no row has; the columns found are "
        f"{', '.join(found):.200}"
    )


def split_rows(rows: Rows, holdout: float, elsewhere: Places = NOWHERE) -> tuple[Sequence[int], Sequence[int]]:
    """(training indices, held-out indices): a row is held out iff the hash of its prompt is below `holdout`.

    A row's side therefore depends only on the row, not on its index, the process or the other rows. Held-out indices are
    in the order of the hash. A generator has practically endless training indices, and its held-out
    indices are the first few hundred with different keys; both are found lazily. Rows whose key is in `elsewhere` (held
    out by another source) are on neither side, unless this source holds them out too.
    """
    if not 0.0 <= holdout <= 1.0:
        raise UserError(f"{rows.path}: holdout is {holdout}; it is the fraction of rows held out, from 0 to 1")
    if rows.generated:
        training = _Training(rows, holdout, frozenset(elsewhere.tolist())) if holdout < 1 else ()
        return training, (_HeldOut(rows, holdout) if holdout > 0 else ())
    places = rows.measures.places
    held_out = np.flatnonzero(places < holdout)
    train: Any = np.flatnonzero((places >= holdout) & ~np.isin(places, elsewhere))
    ordered: Any = held_out[np.argsort(places[held_out], kind="stable")]
    return train, ordered


def _measure(rows: Iterable[Row]) -> Measures:
    found = [(split_place(_key(row)), texts_of(row)) for row in rows]
    return Measures(
        np.array([place for place, _ in found], np.float64),
        np.array([len(texts) for _, texts in found], np.int64),
        np.array([sum(map(len, texts)) for _, texts in found], np.int64),
    )


def _key(row: Row) -> str:
    """The split key of a row; for an unreadable row its raw text."""
    return row.raw if isinstance(row, Unreadable) else split_key(row)


def _measure_piece(_: None, piece: Piece) -> tuple[Piece, Measures]:
    return piece, _measure(readers.read(piece))


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """All texts of a row that a stage may train on."""
    found: list[Any] = []
    row = canonical(row)
    for column in TEXT_COLUMNS:
        value = row.get(column)
        turns = value if isinstance(value, list) else [{"content": value}]
        found += [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    return [text for text in found if isinstance(text, str)]


class _Training(Sequence[int]):
    """Training indices of a generator: index k is the first row from k * STRIDE on that no source holds out."""

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
    """Held-out indices of a generator: held-out rows among its first rows, each key once, found on first use."""

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
    kind, _, name = path.partition(":")
    if kind == "gym":
        make = functools.partial(gym.gym_row, name)
        return _few(path, make, gym.FEWER[name]) if name in gym.FEWER else _endless(path, make, gym.LENGTH)
    if name == "docs":
        return _in_memory(path, _documents(), python_docs.fingerprint(_documents()))
    if name == "drills":
        return _few(path, curriculum.drill_row, curriculum.DRILLS)
    if name not in curriculum.GENERATORS:
        names = [f"gen:{known}" for known in ("docs", "drills", *curriculum.GENERATORS)]
        hint = nearest(path, names) or f"; there are {', '.join(names)}"
        raise UserError(f"{path}: there is no such generator{hint}")
    return _endless(path, curriculum.GENERATORS[name], curriculum.LENGTH)


def _few(path: str, generate: Callable[[int], Row], length: int) -> Rows:
    made = [generate(index) for index in range(length)]
    return _in_memory(path, made, hashlib.sha256(canonical_json(made).encode()).hexdigest())


def _endless(path: str, generate: Callable[[int], Row], length: int) -> Rows:
    make = functools.lru_cache(maxsize=64)(generate)  # the split reads a row before it is used
    digest = hashlib.sha256(canonical_json([make(index) for index in range(PROBED)]).encode())
    return Rows(path, length, make, digest.hexdigest(), lambda i: f"{path} row {i}", generated=True)


@functools.lru_cache(maxsize=1)
def _documents() -> tuple[Row, ...]:
    """`python_docs.documents()`, cached for the same Python, since it takes seconds."""

    def build(writer: Writer) -> None:
        writer.append("rows", np.frombuffer(json.dumps(python_docs.documents()).encode(), np.uint8))

    entry = current_cache().entry("documents", python_docs.made_of(), build, "the documents of Python's own library")
    return tuple(json.loads(entry.path("rows").read_bytes()))


def _files(folder: Path, path: str) -> tuple[list[Path], tuple[str, ...]]:
    """Files of a folder with a known suffix, by name, and a line that names the files that are not read.

    A `.json` file beside files of other kinds is not read: it may be anything. Hidden files are not read either: editors and
    copies from other systems leave them.
    """
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    files = [file for file in there if readers.kind_of(file) and not file.is_dir() and not file.name.startswith(".")]
    files = [file for file in files if readers.kind_of(file) != ".json"] or files
    for file in files:
        if why := why_missing(str(file)):
            raise UserError(why)
    if not files:
        raise UserError(f"{path}: there is no {', '.join(FILES)} file in this folder")
    splits = next(iter(dataset_folder.by_files(folder, files).values()), ())
    said = f"the files are named after splits ({', '.join(splits)}), and all are read; {path}/{next(iter(splits), '')} is one"
    others = [f"{file.name}/" if file.is_dir() else file.name for file in there if file not in files]
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    note = f"{len(files)} {'file is' if len(files) == 1 else 'files are'} read; not read: {shown}"
    return files, (*([said] if len(splits) > 1 else []), *([note] if others else []))


def _read_files(files: Sequence[tuple[str, Path]], path: str, columns: tuple[str, ...], drop: bool) -> Rows:
    """The rows of several files in order; `files` are (name for messages, path)."""
    cache = current_cache()
    with WorkerPool(f"{path}: reading", "rows", sum(file.stat().st_size for _, file in files)) as pool:
        parts = pool.each(lambda named: _read_file(*named, cache, pool, columns, drop), files)
    whole = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    full = [part for part in parts if len(part)]
    if not full:
        raise UserError(f"{path}: {'the file is' if len(files) == 1 else f'all {len(files)} files are'} empty")
    rows = _of_parts(path, full, parts[0].fingerprint if files[0][0] == path else whole)
    empty = [part.name for part in parts if not len(part)]
    return replace(rows, notes=(f"{len(empty)} files have no rows, the first is {empty[0]}",)) if empty else rows


def _read_file(name: str, file: Path, cache: Cache, pool: WorkerPool, columns: tuple[str, ...], drop: bool) -> Part:
    kind = readers.kind_of(file)
    if kind is None:
        raise UserError(
            f"{name}: cannot read this kind of file; a source is {', '.join(FILES)}, a folder of these, "
            "tfds:NAME/SPLIT, gen:NAME or gym:NAME"
        )
    content = cache.digest(file)

    def build(writer: Writer) -> None:
        _index(writer, Piece(name, file, kind, 0, NO_SPANS, columns, drop), FORMATS[kind].unpack(name, file), pool)

    entry = cache.entry("rows", {"content": content, "format": kind} | _reading(columns, drop), build, name)
    return _part(name, file, kind, entry, content, columns, drop)


def _read_tfds(path: str, data_dir: str | Path | None, columns: tuple[str, ...], drop: bool) -> Rows:
    """The rows of a TFDS split, unpacked as JSON lines; the fingerprint is over these."""
    cache = current_cache()
    files, lines = tfds_rows.find(path.removeprefix("tfds:"), data_dir)

    def build(writer: Writer) -> None:
        _index(writer, Piece(path, files[0], "tfds", 0, NO_SPANS, columns, drop), lines(), pool)

    with WorkerPool(f"{path}: reading", "rows", sum(file.stat().st_size for file in files)) as pool:
        made_of = {"content": [cache.digest(file) for file in files], "format": "tfds"} | _reading(columns, drop)
        entry = cache.entry("rows", made_of, build, path)
    part = _part(path, files[0], "tfds", entry, entry.files["unpacked"]["sha256"], columns, drop)
    return _of_parts(path, [part], None)


def _index(writer: Writer, whole: Piece, unpacked: Iterator[bytes] | None, pool: WorkerPool) -> None:
    """Index a file into a cache entry: the offset and measures of every row. `whole` says how to read the file."""
    name, file, kind = whole.name, whole.file, whole.kind
    if unpacked is not None:
        for block in pool.unless_stopped(itertools.chain([b""], unpacked)):
            writer.append("unpacked", np.frombuffer(block, np.uint8))
        packed, file, kind = file, writer.flushed("unpacked"), _kind_unpacked(kind)
        pool.progress.expect(file.stat().st_size - packed.stat().st_size)

    def pieces() -> Iterator[Piece]:
        first = 0
        for spans in FORMATS[kind].locate(name, file):
            for low, high in readers.cuts(spans, kind):
                yield whole._replace(file=file, kind=kind, first=first + low, spans=spans[low:high])
            first += len(spans)

    nothing = whole._replace(spans=NO_SPANS), _measure(())  # so that a file without rows has the same arrays
    for piece, found in itertools.chain([nothing], pool.map(_measure_piece, pieces())):
        writer.append("spans", piece.spans)
        for column, values in zip(Measures._fields, found, strict=True):
            writer.append(column, values)
        pool.progress.advance(piece.text_bytes, len(piece.spans))


def _part(
    name: str, file: Path, packed: str, entry: Entry, fingerprint: str, columns: tuple[str, ...], drop: bool
) -> Part:
    kind = packed
    if "unpacked" in entry.files:
        file, kind = entry.path("unpacked"), _kind_unpacked(packed)
    return Part(name, file, kind, entry, fingerprint, packed, columns, drop)


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
    how = parts[0]
    return Rows(path, int(bounds[-1]), fetch, own, where, parts=tuple(parts), columns=how.columns, drop=how.drop)


def _in_memory(path: str, rows: Sequence[Row], fingerprint: str) -> Rows:
    return Rows(path, len(rows), rows.__getitem__, fingerprint, lambda i: f"{path} row {i}")


def why_missing(path: str) -> str | None:
    """One line on why a source's file is missing or cannot be read, and what is there instead; None if it can be read."""
    if path.startswith((*GENERATED, "tfds:", COLLECTED)):
        return None
    if not path.strip():
        return "a source has an empty path; name a file, a folder, tfds:NAME/SPLIT, gen:NAME or gym:NAME"
    if why := readers.why_not_a_file(path):
        return why
    file = Path(path).expanduser()
    try:
        if file.exists() or dataset_folder.find(path):
            return None
    except UserError as error:
        return str(error)
    if file.is_symlink():
        return f"{path}: is a link to {os.readlink(file)}, which is not there"
    if not file.parent.is_dir():
        return f"{path}: there is no folder {file.parent}"
    names = [entry.name for entry in file.parent.iterdir() if entry.name.endswith(FILES)]
    near = difflib.get_close_matches(file.name, names, n=3)
    found = ", ".join(sorted(names)[:5]) or f"no {', '.join(FILES)}"
    hint = f"did you mean {' or '.join(near)}?" if near else f"{file.parent.resolve()} has {found}"
    return f"{path}: there is no such file; {hint}"
