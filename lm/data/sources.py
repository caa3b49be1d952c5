"""Where rows come from: a path becomes random access to dicts, and a hash says which of them are held out.

Paths: `.txt`, `.jsonl`, `.jsonl.gz`, `.parquet`, a folder of these, `tfds:NAME/SPLIT`, `gen:NAME`. Rows as people
have them: {"text"}; {"messages"}; {"prompt", "chosen", "rejected"}; {"question", "answer"}; more columns do no harm.
Rows with the same `key` are held out together, and a row whose `key` is None never is.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from lm.data import curriculum, python_docs, tfds_rows
from lm.experiment import UserError

DOCUMENT = 4_000  # characters of a document cut from a text file, roughly
PROBED = 256  # rows of a generator that its fingerprint is taken over
STRIDE = 16  # generated rows from which one training example is taken: the first that is not held out
SEARCHED = 100_000  # generated rows looked through for held-out ones
HELDOUT_GENERATED = 500  # held-out rows taken from a generator

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Random access to the rows of a source. `where(i)` names row i for a person; `generated` rows are made on demand."""

    path: str
    length: int
    fetch: Callable[[int], Row]
    fingerprint: str
    where: Callable[[int], str]
    generated: bool = False

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


def load_rows(path: str, data_dir: str | Path | None = None) -> Rows:
    """The rows of a source. `data_dir` is where TFDS keeps its data, by default where TFDS itself does.

    Raises UserError for what is missing, unknown, empty or broken, naming file and line.
    """
    if path.startswith("gen:"):
        return _generated(path)
    if path.startswith("tfds:"):
        rows, fingerprint = tfds_rows.read(path.removeprefix("tfds:"), data_dir)
        return _in_memory(path, rows, fingerprint)
    if missing := why_missing(path):
        raise UserError(missing)
    file = Path(path).expanduser()
    return _read_folder(file, path) if file.is_dir() else _read_file(file, path)


def split_rows(rows: Rows, holdout: float) -> tuple[Sequence[int], Sequence[int]]:
    """(training indices, held-out indices): a row is held out iff the hash of what it asks is below `holdout`.

    So a row's side depends on nothing but itself: not on its place, the process or the other rows. Held-out indices come
    in the order of the hash. Of a generator the training indices have no end for practical purposes, and the held-out
    ones are the first few hundred of different keys; both are found when asked for.
    """
    if not 0.0 <= holdout <= 1.0:
        raise UserError(f"{rows.path}: holdout is {holdout}; it is the part of the rows held out, from 0 to 1")
    if rows.generated:
        return (_Training(rows, holdout) if holdout < 1 else ()), (_HeldOut(rows, holdout) if holdout > 0 else ())
    places = np.array([split_place(split_key(row)) for row in rows])
    held_out = np.flatnonzero(places < holdout)
    return np.flatnonzero(places >= holdout).tolist(), held_out[np.argsort(places[held_out], kind="stable")].tolist()


def split_key(row: Mapping[str, Any]) -> str | None:
    """What a row is held out by: `key` if it has one, else its prompt or question, else all of it, as canonical JSON.

    Rows that ask the same are so on one side of the split, whatever they answer.
    """
    if "key" in row:
        return row["key"] if row["key"] is None or isinstance(row["key"], str) else _canonical(row["key"])
    for column in ("prompt", "question"):
        if column in row:
            return _canonical(row[column])
    return _canonical(row)


def split_place(key: str | None) -> float:
    """A number that is uniform in [0, 1) over keys: the first 53 bits of sha256. 1 for None, which is never held out."""
    if key is None:
        return 1.0
    return (int.from_bytes(hashlib.sha256(key.encode(errors="replace")).digest()[:8], "big") >> 11) / (1 << 53)


class _Training(Sequence[int]):
    """Index k is the first generated row from k * STRIDE on that is not held out."""

    def __init__(self, rows: Rows, holdout: float):
        self._rows, self._holdout = rows, holdout

    def __len__(self) -> int:
        return len(self._rows) // STRIDE

    def __getitem__(self, place):  # type: ignore[override]
        if not 0 <= place < len(self):
            raise IndexError(f"no training example {place}")
        for index in range(place * STRIDE, min(place * STRIDE + SEARCHED, len(self._rows))):
            if split_place(split_key(self._rows[index])) >= self._holdout:
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
    found: dict[str | None, int] = {}
    for index in range(SEARCHED):
        key = split_key(rows[index])
        if split_place(key) < holdout:
            found.setdefault(key, index)
            if len(found) == HELDOUT_GENERATED:
                break
    return tuple(found.values())


def _generated(path: str) -> Rows:
    name = path.removeprefix("gen:")
    if name == "docs":
        return _in_memory(path, python_docs.documents(), python_docs.fingerprint())
    if name == "drills":
        drills = [curriculum.drill_row(index) for index in range(curriculum.DRILLS)]
        return _in_memory(path, drills, hashlib.sha256(_canonical(drills).encode()).hexdigest())
    if name not in GENERATORS:
        names = ["docs", "drills", *GENERATORS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean gen:{near[0]}?" if near else f"there are {', '.join(f'gen:{n}' for n in names)}"
        raise UserError(f"{path}: there is no such generator; {hint}")
    make = functools.lru_cache(maxsize=64)(GENERATORS[name])  # the split looks at a row before it is used
    digest = hashlib.sha256(_canonical([make(index) for index in range(PROBED)]).encode())
    return Rows(path, curriculum.LENGTH, make, digest.hexdigest(), lambda i: f"{path} row {i}", generated=True)


GENERATORS: dict[str, Callable[[int], Row]] = {
    "instruct": curriculum.instruct_row,
    "arithmetic": curriculum.arithmetic_row,
    "preferences": curriculum.preference_row,
}


def _read_file(file: Path, path: str) -> Rows:
    reader = _reader(file)
    if reader is None:
        raise UserError(
            f"{path}: cannot read this kind of file; a source is {', '.join(READERS)}, a folder of these, "
            "tfds:NAME/SPLIT or gen:NAME"
        )
    rows, places = reader(file)
    with file.open("rb") as stream:
        fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
    return _in_memory(path, rows, fingerprint, places)


def _read_folder(folder: Path, path: str) -> Rows:
    """The rows of every file in it that has one of our endings, file after file by name."""
    files = sorted(file for file in folder.iterdir() if _reader(file) and file.is_file())
    if not files:
        raise UserError(f"{path}: there is no {', '.join(READERS)} file in this folder")
    parts = [_read_file(file, str(file)) for file in files]
    rows = [row for part in parts for row in part]
    places = [part.where(index) for part in parts for index in range(len(part))]
    fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Rows(path, len(rows), rows.__getitem__, fingerprint, places.__getitem__)


def _reader(file: Path) -> Callable[[Path], tuple[list[Row], list[int] | None]] | None:
    return next((read for suffix, read in READERS.items() if file.name.endswith(suffix)), None)


def _in_memory(path: str, rows: Sequence[Row], fingerprint: str, lines: Sequence[int] | None = None) -> Rows:
    if not rows:
        raise UserError(f"{path}: empty, there is not one row in it")
    return Rows(
        path,
        len(rows),
        rows.__getitem__,
        fingerprint,
        lambda i: f"{path} {f'line {lines[i]}' if lines else f'row {i}'}",
    )


def _read_text(file: Path) -> tuple[list[Row], None]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it, for instance with iconv") from error
    return [{"text": document} for document in cut_text(text, DOCUMENT)], None


def cut_text(text: str, size: int) -> list[str]:
    """Documents of about `size` characters, cut at blank lines where there are any, else at lines, spaces, anywhere."""
    documents, at = [], 0
    while at < len(text):
        end = len(text)
        if end - at > size * 3 // 2:
            low, high = at + size * 3 // 4, at + size * 3 // 2
            found = ((text.find(mark, low, high), len(mark)) for mark in ("\n\n", "\r\n\r\n", "\n", " "))
            end = next((place + width for place, width in found if place >= 0), at + size)
        document = text[at:end].strip("\r\n")
        if document.strip():
            documents.append(document)
        at = end
    return documents


def _read_jsonl(file: Path) -> tuple[list[Row], list[int]]:
    rows, lines = [], []
    opener = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opener(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    rows.append(_parse(line, file, number))
                    lines.append(number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file, broken after line {number} ({error})") from error
    return rows, lines


def _parse(line: bytes, file: Path, number: int) -> Row:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise UserError(
            f"{file} line {number}: not valid JSON ({error}); every line must be one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{file} line {number}: every line must be a JSON object, found {line.strip().decode(errors='replace'):.40}"
        )
    return row


def _read_parquet(file: Path) -> tuple[list[Row], None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading parquet needs pyarrow; pip install pyarrow, or convert the file to .jsonl"
        ) from error
    try:
        return pyarrow.parquet.read_table(file).to_pylist(), None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not a parquet file ({error})") from error


READERS: dict[str, Callable[[Path], tuple[list[Row], list[int] | None]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


def why_missing(path: str) -> str | None:
    """One line that says that the file of a source is not there, and what is; None for what is no file or is there."""
    file = Path(path).expanduser()
    if path.startswith(("gen:", "tfds:")) or file.exists():
        return None
    if not file.parent.is_dir():
        return f"{path}: there is no folder {file.parent}"
    names = [entry.name for entry in file.parent.iterdir() if entry.name.endswith(tuple(READERS))]
    near = difflib.get_close_matches(file.name, names, n=3)
    found = ", ".join(sorted(names)[:5]) or f"no {', '.join(READERS)}"
    hint = f"did you mean {' or '.join(near)}?" if near else f"{file.parent.resolve()} has {found}"
    return f"{path}: there is no such file; {hint}"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
