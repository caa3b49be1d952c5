"""The log of choices: an append-only file of JSON lines, each synced to disk before it is acknowledged.

A line has a checksum of its fields but for clocks, `crc32`, by which damage is detected; lines of an older lm, or edited by hand,
have none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm.config.field import shown
from lm.experiment import UserError
from lm.stored import take_lock

Record = dict[str, Any]

CHOICES = ("left", "right", "tie", "both bad", "skip")

SEAL = "crc32"
CLOCKS = ("time", "seconds")  # differ where the same choices are made again

STRENGTHS = (1, 2, 3)  # slightly, clearly, much better

Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_turns(value: Any) -> bool:
    """Whether a value is a prompt or an answer: a text, or turns with role and content."""
    if isinstance(value, str):
        return True
    parts = ("role", "content")
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(t, dict) and all(is_text(t.get(p)) for p in parts) for t in value)
    )


def is_strength(value: Any) -> bool:
    """Whether a value is one of STRENGTHS or None; True and 1.0 are not."""
    return value is None or (type(value) is int and value in STRENGTHS)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_side(value: Any) -> bool:
    return isinstance(value, dict) and is_turns(value.get("answer")) and _is_text_or_none(value.get("source"))


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_seconds(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


# Fields of a record by its kind; an optional one is None where missing.
FIELDS: dict[str, dict[str, Check]] = {
    "choice": {
        "id": _is_id, "annotator": _is_name, "pair": _is_name, "prompt": is_turns, "left": _is_side, "right": _is_side,
        "choice": lambda value: value in CHOICES, "strength": is_strength, "comment": _is_text_or_none, "seconds": _is_seconds,
        "time": _is_text_or_none,
    },
    "undo": {"id": _is_id, "annotator": _is_name, "of": _is_id, "time": _is_text_or_none},
}  # fmt: skip


def fault_of(record: Any) -> str:
    """What makes a value an invalid record: the bad field; "" for a valid record."""
    if not isinstance(record, dict):
        return "it is not a JSON object"
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"kind is {shown(kind)}"
    return next(
        (f"{name} is {shown(record.get(name))}" for name, good in FIELDS[kind].items() if not good(record.get(name))),
        "",
    )


class Contents(NamedTuple):
    """The records of a log, their size in bytes, and a remark on a truncated last line ("" if complete)."""

    records: list[Record]
    size: int
    remark: str


class Log:
    """An open log, locked by this process. Made by `open_log`; `append` is not thread-safe."""

    def __init__(self, path: Path, handle: int, contents: Contents):
        self.path = path
        self.records = contents.records
        self.remark = contents.remark
        self._handle = handle
        self._size = contents.size

    def append(self, record: Mapping[str, Any]) -> Record:
        """Append a record with the next `id`, and wait until it is on disk.

        A failed write leaves the file unchanged. Raises OSError (a full disk), and UserError for
        a record that `read_log` would refuse.
        """
        numbered = {"id": max((one["id"] for one in self.records[-1:]), default=0) + 1, **record}
        line = (json.dumps(numbered | {SEAL: _crc32(numbered)}) + "\n").encode()
        fault = fault_of(numbered)
        if fault or _parse(line) != (numbered, ""):
            raise UserError(f"this choice cannot be recorded: {fault or 'it would be read as another choice'}")
        try:
            _write(self._handle, line, self._size)
        except OSError:
            os.ftruncate(self._handle, self._size)
            raise
        self._size += len(line)
        self.records.append(numbered)
        return numbered


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[Log]:
    """Open a log exclusively, creating it if missing. Removes a truncated last line.

    The lock ends with the process. Raises UserError while another process holds the file, and where
    a line is not a record.
    """
    _refuse_no_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = take_lock(path, "--labels FILE")
    if handle is None:
        raise UserError(
            f"{path} is in use by another `lm label`: open its page, stop it, or name another file (--labels FILE)"
        )
    try:
        _sync_folder(path.parent)
        contents = read_log(path)
        if os.fstat(handle).st_size != contents.size:
            os.ftruncate(handle, contents.size)
        _end_last_line(handle, contents.size)
        yield Log(path, handle, contents._replace(size=os.fstat(handle).st_size))
    finally:
        os.close(handle)


def read_log(path: Path) -> Contents:
    """Read the records of a log that may be being written. An incomplete last line is skipped.

    Raises UserError where any other line is not a record, or repeats an id.
    """
    _refuse_no_file(path)
    content = path.read_bytes()
    records: list[Record] = []
    numbers: set[int] = set()
    size = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        record, fault = _parse(line)
        if fault:
            if size + len(line) == len(content) and not line.endswith(b"\n"):
                start = line.decode(errors="replace")
                return Contents(
                    records, size, f"{path} line {number} was cut while it was written and is dropped: {start!r:.60}"
                )
            raise UserError(f"{path} line {number} is not a record of a choice ({fault}): fix or remove that line")
        size += len(line)
        if record is not None:
            if record["id"] in numbers:
                raise UserError(
                    f"{path} line {number} has the id {record['id']} of an earlier line: two files were joined?"
                )
            numbers.add(record["id"])
            records.append(record)
    return Contents(records, size, "")


def _refuse_no_file(path: Path) -> None:
    """Refuse a folder, and a pipe or device, whose reading would not end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; choices need one (--labels FILE)")


def _parse(line: bytes) -> tuple[Record | None, str]:
    """Parse a line: (record, ""), or (None, reason) for an invalid or truncated record, or (None, "") for a blank line."""
    if not line.strip():
        return None, ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "it is not JSON"
    seal = record.pop(SEAL, None) if isinstance(record, dict) else None
    if seal is not None and seal != _crc32(record):
        return None, f"it does not match its {SEAL}, which a line that is edited by hand should lack"
    record = _with_whole_numbers(record)
    fault = fault_of(record)
    return (None, fault) if fault else (record, "")


def _crc32(record: Record) -> str:
    sealed = {name: value for name, value in record.items() if name not in CLOCKS}
    return f"{zlib.crc32(json.dumps(sealed, sort_keys=True).encode()):08x}"


def _with_whole_numbers(record: Any) -> Any:
    """The record with 3.0 converted to 3 in integer fields: earlier versions accepted both."""
    if not isinstance(record, dict):
        return record
    given = {name: record.get(name) for name in ("id", "of", "strength")}
    return record | {name: int(value) for name, value in given.items() if type(value) is float and value.is_integer()}


def _end_last_line(handle: int, size: int) -> None:
    """Complete a last record that lacks only its newline."""
    if size and os.pread(handle, 1, size - 1) != b"\n":
        _write(handle, b"\n", size)


def _write(handle: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(handle, data, at)
        data, at = data[written:], at + written
    os.fsync(handle)


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that a new file survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
