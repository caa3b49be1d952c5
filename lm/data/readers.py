"""Readers of row files (text, JSON lines, CSV, parquet …): index every row's offset, and read any piece of a file.

A row is a dict. A file is never held in memory as a whole (for parquet, one row group is), and any row can be read alone. Files
without random access (gzip, TFDS, other line ends) are unpacked once into the cache.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import os
import stat
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from lm.data import bad_rows, json_text, tables
from lm.data.bad_rows import BadRow, Unreadable
from lm.data.layouts import READ_COLUMNS
from lm.experiment import UserError

DOCUMENT = 4_000  # approximate characters of a document cut from a text file
BLOCK = 1 << 20  # bytes read at once
SPANS = 1 << 16  # rows whose offsets are held as Python integers at once
PIECE_BYTES = 2 << 20  # bytes of text in a piece; rows are not split
PARQUET_ROWS = 256  # parquet rows held as Python values at once
GROUP = 1 << 32  # offset of a parquet row: group * GROUP + index in the group
BOM = codecs.BOM_UTF8


Row = dict[str, Any]
Spans = Int64[np.ndarray, "N 3"]


class Piece(NamedTuple):
    """A contiguous piece of a file's rows. `name` is the file's name in messages, `first` the number of the first row.

    spans [N 3]: each row's offset, approximate size in bytes, and line (0: none).
    """

    name: str
    file: Path
    kind: str
    first: int
    spans: Spans
    columns: tuple[str, ...] = ()  # as `Source.columns`
    drop: bool = False  # return Unreadable for a row that cannot be read instead of raising BadRow

    @property
    def text_bytes(self) -> int:
        return int(self.spans[:, 1].sum())

    def where(self, place: int) -> str:
        """Location of row `place` of the piece, for messages."""
        line = self.spans[place, 2]
        return f"{self.name} {f'line {line}' if line else f'row {self.first + place}'}"


class Format(NamedTuple):
    """A file format. `unpack` yields the bytes of an unpacked copy of kind `unpacked`, or is None."""

    locate: Callable[[str, Path], Iterator[Spans]]
    read: Callable[[Piece], Iterator[Row]]
    unpack: Callable[[str, Path], Iterator[bytes] | None] = lambda name, file: None
    unpacked: str = ".jsonl"


def kind_of(file: Path) -> str | None:
    """The key of FORMATS that a file's name ends with."""
    return next((suffix for suffix in FILES if file.name.endswith(suffix)), None)


def read(piece: Piece) -> Iterator[Row]:
    """Read the rows of a piece, with columns renamed. Raises UserError naming the broken line, or the
    missing file."""
    theirs = names_of(piece.columns)
    try:
        for row in FORMATS[piece.kind].read(piece):
            yield renamed(row, theirs) if theirs else row
    except FileNotFoundError as error:
        raise UserError(
            f"{piece.file} was removed while it was being read; run the same command again to go on without it"
        ) from error


def names_of(columns: Iterable[str]) -> dict[str, str]:
    """Parse `Source.columns` into {theirs: ours}. Raises UserError unless each is ours=theirs."""
    pairs = [column.split("=", 1) for column in columns]
    names = {pair[-1].strip(): pair[0].strip() for pair in pairs}
    if not all(len(pair) == 2 and all(map(str.strip, pair)) for pair in pairs) or len(set(names.values())) < len(pairs):
        raise UserError(
            f"columns is {', '.join(columns)!r}; it has ours=theirs, each name once: prompt=query,completion=reply"
        )
    return names


def renamed(row: Row, theirs: dict[str, str]) -> Row:
    """Rename the row's columns by {theirs: ours}."""
    if isinstance(row, Unreadable):
        return row
    given = {ours: row[name] for name, ours in theirs.items() if name in row}
    return {name: value for name, value in row.items() if name not in theirs and name not in given} | given


def why_not_a_file(path: str) -> str | None:
    """One line that says why an existing path cannot be read as a file or folder; None if it is missing or readable."""
    try:
        file = Path(path).expanduser()
        mode = file.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return f"{path!r:.80}: cannot be read: {why}"
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
        what = next((name for check, name in kinds if check(mode)), "a device")
        return f"{path}: is {what}, not a file; a source must be readable more than once"
    return None if os.access(file, os.R_OK) else f"{path}: cannot be read: Permission denied"


def cuts(spans: Spans, kind: str) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of pieces of about PIECE_BYTES; a parquet row group is not split."""
    start = 0
    if kind == ".parquet":
        ends = [*(np.flatnonzero(np.diff(spans[:, 0] // GROUP)) + 1).tolist(), len(spans)]
    else:
        done = np.cumsum(spans[:, 1])
        ends = [*(np.flatnonzero(np.diff(done // PIECE_BYTES)) + 1).tolist(), len(spans)]
    for end in ends:
        if end > start:
            yield start, end
            start = end


def cut_text(text: str, size: int) -> list[str]:
    """Split text into documents of about `size` characters, at blank lines if possible, else at lines, spaces, anywhere."""
    pieces = (piece.strip("\r\n") for piece in _cut([text], size))
    return [piece for piece in pieces if piece.strip()]


def _cut(texts: Iterable[str], size: int) -> Iterator[str]:
    """Split text into documents that include the line ends around them."""
    rest, todo = "", iter(texts)
    for more in todo:
        rest, at = rest + more, 0
        while len(rest) - at > size * 3 // 2:
            low, high = at + size * 3 // 4, at + size * 3 // 2
            found = ((rest.find(mark, low, high), len(mark)) for mark in ("\n\n", "\r\n\r\n", "\n", " "))
            end = next((place + width for place, width in found if place >= 0), at + size)
            yield rest[at:end]
            at = end
        rest = rest[at:]
    if rest:
        yield rest


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def _decoded(name: str, file: Path) -> Iterator[str]:
    """Decode a file, dropping its byte order mark. Raises UserError where it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    begun = 0
    for number, block in enumerate(_with_end(file)):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: not UTF-8 text (byte {begun - pending + error.start}); convert it, for instance with iconv"
            ) from error
        begun += len(block)
        yield text.removeprefix("\ufeff") if number == 0 else text


def _with_end(file: Path) -> Iterator[bytes]:
    yield from _blocks(file)
    yield b""


def _locate_documents(name: str, file: Path) -> Iterator[Spans]:
    at = len(BOM) if next(_with_end(file)).startswith(BOM) else 0
    spans: list[tuple[int, int, int]] = []
    for document in _cut(_decoded(name, file), DOCUMENT):
        size = len(document.encode())
        if document.strip():
            spans.append((at, size, 0))
        at += size
        if len(spans) == SPANS:
            yield np.array(spans)
            spans = []
    if spans:
        yield np.array(spans)


def _read_documents(piece: Piece) -> Iterator[Row]:
    with piece.file.open("rb") as stream:
        for start, size, _ in piece.spans.tolist():
            stream.seek(start)
            yield {"text": stream.read(size).decode().strip("\r\n")}


def _plain_line_ends(name: str, file: Path) -> Iterator[bytes] | None:
    """The file's bytes with Unix line ends; None if it has no others."""
    if not any(b"\r" in block for block in _blocks(file)):
        return None

    def texts() -> Iterator[bytes]:
        kept = ""
        for text in _decoded(name, file):
            text = kept + text
            kept = "\r" if text.endswith("\r") else ""  # its second half may be in the next block
            yield text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n").encode()
        yield b"\n" if kept else b""

    return texts()


def _locate_lines(name: str, file: Path) -> Iterator[Spans]:
    at, spans = 0, []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                spans.append((at, len(line), number))
                if len(spans) == SPANS:
                    yield np.array(spans)
                    spans = []
            at += len(line)
    if spans:
        yield np.array(spans)


def _locate_rows(name: str, file: Path) -> Iterator[Spans]:
    """Locate unpacked rows, which have a number rather than a line."""
    for spans in _locate_lines(name, file):
        spans[:, 2] = 0
        yield spans


def _read_lines(piece: Piece) -> Iterator[Row]:
    columns = READ_COLUMNS | names_of(piece.columns).keys()
    with piece.file.open("rb") as stream:
        for place, (start, size, _) in enumerate(piece.spans.tolist()):
            stream.seek(start)
            line = stream.read(size)
            try:
                row = _parse(line, piece.where(place), columns)
            except BadRow as error:
                if not piece.drop:
                    raise
                row = Unreadable(error, line.decode(errors="replace"))
            yield row


def _parse(line: bytes, where: str, columns: Container[str]) -> Row:
    if line.startswith(tables.BAD):
        why, reason = tables.why_bad(line)
        raise BadRow(f"{where}: {why}", reason)
    try:
        text = line.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise BadRow(
            f"{where}: not UTF-8 text (byte {error.start} of the line); convert the file, for instance with iconv",
            bad_rows.JSON,
        ) from error
    twice: json_text.Twice = {}
    try:
        row = json_text.loads(text, twice)
    except ValueError as error:
        raise BadRow(
            f"{where}: not valid JSON ({error!s:.150}); every line must be one JSON object", bad_rows.JSON
        ) from error
    if not isinstance(row, dict):
        raise BadRow(f"{where}: every line must be a JSON object, found {text.strip():.40}", bad_rows.JSON)
    if (name := json_text.key_twice(row, twice, columns)) is not None:
        raise BadRow(f"{where}: the key {name!r:.40} appears twice in one object", bad_rows.JSON)
    return row


def _unzipped(name: str, file: Path) -> Iterator[bytes]:
    number = 0
    try:
        with gzip.open(file, "rb") as stream:
            lines: list[bytes] = []
            for line in stream:
                number += 1
                lines.append(line)
                if len(lines) >= 256:
                    yield b"".join(lines)
                    lines = []
            yield b"".join(lines)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name}: not a whole gzip file, broken after line {number} ({error})") from error


def _parquet(name: str, file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    with _damaged(name, "not a parquet file"):
        return pyarrow.parquet.ParquetFile(file)


@contextlib.contextmanager
def _damaged(name: str, what: str) -> Iterator[None]:
    """Context that turns pyarrow's error on a damaged file into one line."""
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{name}: {what} ({' '.join(str(error).split()):.150})") from error


def _locate_parquet(name: str, file: Path) -> Iterator[Spans]:
    with _damaged(name, "not a whole parquet file"):
        metadata = _parquet(name, file).metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            spans = np.zeros((group.num_rows, 3), np.int64)
            spans[:, 0] = number * GROUP + np.arange(group.num_rows)
            spans[:, 1] = group.total_byte_size // max(1, group.num_rows)
            yield spans


@functools.lru_cache(maxsize=2)
def _row_group(name: str, file: Path, changed: int, number: int) -> Any:
    with _damaged(name, f"damaged in row group {number}"):
        return _parquet(name, file).read_row_group(number)


def _read_parquet(piece: Piece) -> Iterator[Row]:
    changed, done = piece.file.stat().st_mtime_ns, 0
    for start in range(0, len(piece.spans), PARQUET_ROWS):
        places = piece.spans[start : start + PARQUET_ROWS, 0]
        for number in np.unique(places // GROUP).tolist():
            within = places[places // GROUP == number] % GROUP
            table = _row_group(piece.name, piece.file, changed, number).slice(int(within[0]), len(within))
            yield from _python_rows(table, piece, done)
            done += len(within)


def _python_rows(table: Any, piece: Piece, first: int) -> Iterator[Row]:
    """Convert a table to rows; an unreadable column that no stage reads is left out."""
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError, ArithmeticError):
        rows = None
    for place in range(len(table)):
        yield _python_row(table, place, piece, first + place) if rows is None else rows[place]


def _python_row(table: Any, place: int, piece: Piece, number: int) -> Row:
    row: Row = {}
    for name in table.column_names:
        try:
            row[name] = table.column(name)[place].as_py()
        except (ValueError, OverflowError, ArithmeticError) as error:
            if names_of(piece.columns).get(name, name) not in READ_COLUMNS:
                continue
            bad = BadRow(f"{piece.where(number)}: {name} cannot be read ({error!s:.100})", bad_rows.VALUE)
            if not piece.drop:
                raise bad from error
            return Unreadable(bad, f"{name} {error}")
    return row


def _csv(delimiter: str) -> Callable[[str, Path], Iterator[bytes]]:
    return lambda name, file: tables.csv_lines(name, _decoded(name, file), delimiter)


FORMATS = {
    ".txt": Format(_locate_documents, _read_documents, _plain_line_ends, ".txt"),
    ".jsonl": Format(_locate_lines, _read_lines),
    ".jsonl.gz": Format(_locate_lines, _read_lines, _unzipped),
    ".json": Format(_locate_rows, _read_lines, tables.json_lines, "unpacked rows"),
    ".csv": Format(_locate_lines, _read_lines, _csv(",")),
    ".tsv": Format(_locate_lines, _read_lines, _csv("\t")),
    ".parquet": Format(_locate_parquet, _read_parquet),
    "unpacked rows": Format(_locate_rows, _read_lines),
    "tfds": Format(_locate_rows, _read_lines),
}
FILES = tuple(suffix for suffix in FORMATS if suffix.startswith("."))
