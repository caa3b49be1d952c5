"""Readers of row files (text, JSON lines, CSV, parquet …): index every row's offset, and read any piece of a file.

A row is a dict. A file is never held in memory as a whole (for parquet, one row group is), and any row can be read alone. Files
without random access (gzip, TFDS, other line ends) are unpacked once into the cache.
"""

from __future__ import annotations

import codecs
import gzip
import os
import stat
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from lm.data import bad_rows, columnar, json_text, tables
from lm.data.bad_rows import BadRow, Unreadable
from lm.data.columnar import GROUP
from lm.data.layouts import READ_COLUMNS
from lm.experiment import UserError

DOCUMENT = 4_000  # approximate characters of a document cut from a text file
BLOCK = 1 << 20  # bytes read at once
SPANS = 1 << 16  # rows whose offsets are held as Python integers at once
PIECE_BYTES = 2 << 20  # bytes of text in a piece; rows are not split
COLUMNAR_ROWS = 256  # Parquet or Arrow rows held as Python values at once
BOM = codecs.BOM_UTF8
POINTER, LARGEST_POINTER = b"version https://git-lfs", 1024  # of Git LFS; bytes


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
    if not os.access(file, os.R_OK):
        return f"{path}: cannot be read: Permission denied"
    return _why_not_read(path, file) if stat.S_ISREG(mode) else None


def _why_not_read(path: str, file: Path) -> str | None:
    """One line that says why a file has no rows that can be read, by its beginning."""
    try:
        with file.open("rb") as stream:
            start = stream.read(LARGEST_POINTER)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if len(start) < LARGEST_POINTER and start.startswith(POINTER):
        return f"{path}: is a pointer of Git LFS; fetch the file itself (git lfs pull)"
    return None


def cuts(spans: Spans, kind: str, smaller: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of pieces of about PIECE_BYTES / `smaller`; a Parquet row group is not split."""
    start, done = 0, np.cumsum(spans[:, 1])
    last = np.flatnonzero(np.diff(spans[:, 0] // GROUP)) if kind == ".parquet" else np.arange(len(spans) - 1)
    last = np.append(last, len(spans) - 1)[: len(spans)]  # rows after which a piece may end
    full = np.diff(done[last] * smaller // PIECE_BYTES, prepend=0) > 0
    for end in [*(last[full] + 1).tolist(), len(spans)]:
        if end > start:
            yield start, end
            start = end


def _cut(texts: Iterable[str], size: int) -> Iterator[str]:
    """Split text into documents of about `size` characters, at blank lines if possible, else at lines, spaces, anywhere.

    They include the line ends around them.
    """
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
    if file.name.endswith((".gz", ".zst")):
        yield from _unzipped(str(file), file)
        return
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
    """The bytes of a file that gzip or zstandard has packed, about a block at a time."""
    done = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else _zstandard(file) as stream:
            while block := stream.read(BLOCK):
                done += block.count(b"\n")
                yield block
    except FileNotFoundError:
        raise
    except (EOFError, zlib.error, OSError) as error:
        kind = "gzip" if file.name.endswith(".gz") else "zstandard"
        raise UserError(f"{name}: not a whole {kind} file, broken after line {done} ({error})") from error


def _zstandard(file: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


def _read_columnar(piece: Piece) -> Iterator[Row]:
    changed, done = piece.file.stat().st_mtime_ns, 0
    left_out = bytes_columns(piece)
    for start in range(0, len(piece.spans), COLUMNAR_ROWS):
        places = piece.spans[start : start + COLUMNAR_ROWS, 0]
        for number in np.unique(places // GROUP).tolist():
            within = places[places // GROUP == number] % GROUP
            table = columnar.block(piece.name, piece.file, changed, number, left_out)
            yield from _python_rows(table.slice(int(within[0]), len(within)), piece, done)
            done += len(within)


def bytes_columns(piece: Piece) -> tuple[str, ...]:
    """The columns of images, audio or other bytes of a Parquet or Arrow file, which are not read: no stage reads them."""
    if piece.kind not in columnar.KINDS:
        return ()
    changed, named = piece.file.stat().st_mtime_ns, READ_COLUMNS.union(names_of(piece.columns))
    return columnar.bytes_columns(piece.name, piece.file, changed, named)


def _python_rows(table: Any, piece: Piece, first: int) -> Iterator[Row]:
    """Convert a table to rows; an unreadable value of a column that no stage reads is left out."""
    theirs = names_of(piece.columns)
    converters = columnar.converters_of(piece.name, piece.file, piece.file.stat().st_mtime_ns)
    columns = columnar.python_columns(table, converters)
    for place in range(len(table)):
        row: Row = {name: values[place] for name, values in columns.items()}
        for name, error in [item for item in row.items() if isinstance(item[1], Exception)]:
            del row[name]
            if theirs.get(name, name) in READ_COLUMNS:
                bad = BadRow(f"{piece.where(first + place)}: {name} cannot be read ({error!s:.100})", bad_rows.VALUE)
                if not piece.drop:
                    raise bad from error
                row = Unreadable(bad, f"{name} {error}")
                break
        yield row


def _csv(delimiter: str) -> Callable[[str, Path], Iterator[bytes]]:
    return lambda name, file: tables.csv_lines(name, _decoded(name, file), delimiter)


FORMATS = {
    ".txt": Format(_locate_documents, _read_documents, _plain_line_ends, ".txt"),
    ".jsonl": Format(_locate_lines, _read_lines),
    **{
        kind: Format(_locate_lines, _read_lines, _unzipped)
        for kind in (".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
    },
    ".json": Format(_locate_rows, _read_lines, tables.json_lines, "unpacked rows"),
    **{kind: Format(_locate_lines, _read_lines, _csv(",")) for kind in (".csv", ".csv.gz")},
    ".tsv": Format(_locate_lines, _read_lines, _csv("\t")),
    **{kind: Format(columnar.locate, _read_columnar) for kind in columnar.KINDS},
    "unpacked rows": Format(_locate_rows, _read_lines),
    "tfds": Format(_locate_rows, _read_lines),
}
FILES = tuple(suffix for suffix in FORMATS if suffix.startswith("."))
