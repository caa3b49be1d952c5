"""CSV, TSV and JSON files, unpacked to one JSON row a line.

A CSV row is written at the number of its first line; a row of several lines is preceded by empty lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm.data import bad_rows, json_text
from lm.data.layouts import READ_COLUMNS
from lm.experiment import UserError

BAD = b"!"  # begins a line that says why its row is bad
LIST_NAMES = (
    "data",
    "rows",
    "examples",
    "instances",
    "train",
)  # keys under which a JSON object may have its list of rows
LARGEST_FIELD = 1 << 30  # characters


def bad_line(why: str, reason: int) -> bytes:
    """Encode a placeholder line for a bad row; `reason` is an index into `bad_rows.REASONS`."""
    return BAD + json.dumps([why, reason]).encode() + b"\n"


def why_bad(line: bytes) -> tuple[str, int]:
    """Decode a line of `bad_line`: message and reason; any other line is invalid JSON."""
    try:
        value = json_text.loads(line.removeprefix(BAD).decode())
    except ValueError:
        value = None
    match value:
        case [str(why), int(reason)] if 0 < reason < len(bad_rows.REASONS):
            return why, reason
    return "not valid JSON; every line must be one JSON object", bad_rows.JSON


def csv_lines(name: str, texts: Iterable[str], delimiter: str) -> Iterator[bytes]:
    """Convert a CSV file with a header to JSON lines, all values strings.

    Raises UserError for an unusable header and for an unclosed quote.
    """
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(_lines_of(texts), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    written = begun = 0
    try:
        for record in reader:
            begun, ended = begun + 1, reader.line_num
            if header is None:
                header = _header(name, record, delimiter)
                line = b"\n"
            elif not record:
                line = b"\n"
            elif len(record) == len(header):
                line = (
                    json.dumps(dict(zip(header, record, strict=True)), ensure_ascii=False).encode(errors="replace")
                    + b"\n"
                )
            else:
                line = bad_line(f"{len(record)} fields, and the header has {len(header)}", bad_rows.FIELDS)
            yield b"\n" * (begun - 1 - written) + line
            written, begun = begun, ended
    except csv.Error as error:
        raise UserError(
            f"{name} line {reader.line_num}: not CSV ({error}); a field with quotes has them doubled"
        ) from error


def _lines_of(texts: Iterable[str]) -> Iterator[str]:
    """Split texts into lines with their ends; the last may lack one."""
    rest = ""
    for text in texts:
        lines = (rest + text).split("\n")
        rest = lines.pop()
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def _header(name: str, record: list[str], delimiter: str) -> list[str]:
    names = [field.strip() or f"column {number}" for number, field in enumerate(record, start=1)]
    other = next((mark for mark in ",;\t|" if mark != delimiter and len(names) == 1 and mark in names[0]), None)
    if other:
        raise UserError(f"{name} line 1: the header has no {delimiter!r}, and {other!r}; .csv has commas, .tsv tabs")
    if twice := sorted({field for field in names if names.count(field) > 1}):
        raise UserError(f"{name} line 1: the header has the column {twice[0]!r:.60} twice")
    return names


def json_lines(name: str, file: Path) -> Iterator[bytes]:
    """Convert a JSON list of objects, or the one such list of a JSON object, to JSON lines. Reads the whole file.

    A file of one object a line, which repositories of data sets call `.json` too, is copied.
    """
    if _has_lines(file):
        with file.open("rb") as stream:
            yield from stream
        return
    twice: json_text.Twice = {}
    try:
        value = json_text.loads(file.read_bytes().decode("utf-8-sig"), twice)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}); convert it, for instance with iconv") from error
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error!s:.150})") from error
    for number, row in enumerate(_rows_in(name, value)):
        if isinstance(row, dict) and (key := json_text.key_twice(row, twice, READ_COLUMNS)) is not None:
            yield bad_line(f"the key {key!r:.40} appears twice in one object", bad_rows.JSON)
        elif isinstance(row, dict):
            yield json.dumps(row).encode() + b"\n"
        else:
            yield bad_line(
                f"every item must be a JSON object, found {json.dumps(row):.40} as item {number}", bad_rows.JSON
            )


def _has_lines(file: Path) -> bool:
    """Whether the file's first line is a whole JSON object, with more behind it."""
    with file.open("rb") as stream:
        first, more = (
            next((line for line in stream if not line.isspace()), b""),
            any(not line.isspace() for line in stream),
        )
    try:
        return more and isinstance(json_text.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _rows_in(name: str, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list)} if isinstance(value, dict) else {}
    named = [key for key in LIST_NAMES if key in lists] if len(lists) > 1 else list(lists)
    if len(named) != 1:
        keys = f" with the keys {list(value)}"[:100] if isinstance(value, dict) else ""
        raise UserError(
            f"{name}: a .json source is a list of objects, or an object with one such list, under {', '.join(LIST_NAMES)}; "
            f"found {type(value).__name__}{keys}"
        )
    return lists[named[0]]
