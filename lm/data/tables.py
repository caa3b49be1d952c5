"""Files that hold rows in one piece: CSV, TSV and JSON, unpacked to a row a line.

A row of CSV comes out at the number of the line that it begins on, after empty lines where it takes several.
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

BAD = b"!"  # begins a line that says why there is no row
LIST_NAMES = ("data", "rows", "examples", "instances", "train")  # under which a JSON object may have its list of rows
LARGEST_FIELD = 1 << 30  # characters


def bad_line(why: str, reason: int) -> bytes:
    """A line that stands for a row that cannot be read; `reason` is a number of `bad_rows.REASONS`."""
    return BAD + json.dumps([why, reason]).encode() + b"\n"


def why_bad(line: bytes) -> tuple[str, int]:
    """What a line of `bad_line` says, and its reason; a line of somebody else's is no JSON."""
    try:
        value = json_text.loads(line.removeprefix(BAD).decode())
    except ValueError:
        value = None
    match value:
        case [str(why), int(reason)] if 0 < reason < len(bad_rows.REASONS):
            return why, reason
    return "not valid JSON; every line must be one JSON object", bad_rows.JSON


def csv_lines(name: str, texts: Iterable[str], delimiter: str) -> Iterator[bytes]:
    """The records of a CSV file with a header as lines of JSON, all values strings.

    Raises UserError for a file without a usable header, and for quotes that nothing closes.
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
    """The text by lines with their ends, the last also without one."""
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
    """The objects of a JSON list, or of the one list in a JSON object, a line each. The file is read as a whole."""
    twice: json_text.Twice = {}
    try:
        value = json_text.loads(file.read_bytes().decode("utf-8-sig"), twice)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}); convert it, for instance with iconv") from error
    except ValueError as error:
        more = "; a file of one object a line is called .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{name}: not valid JSON ({error!s:.150}){more}") from error
    for number, row in enumerate(_rows_in(name, value)):
        if isinstance(row, dict) and (key := json_text.key_twice(row, twice, READ_COLUMNS)) is not None:
            yield bad_line(f"the key {key!r:.40} stands twice in one object", bad_rows.JSON)
        elif isinstance(row, dict):
            yield json.dumps(row).encode() + b"\n"
        else:
            yield bad_line(
                f"every item must be a JSON object, found {json.dumps(row):.40} as item {number}", bad_rows.JSON
            )


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
