"""The file of choices: lines that are only ever added, each on the disk before anybody is told that it is there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm.experiment import UserError
from lm.stored import lock_file

Record = dict[str, Any]

CHOICES = ("left", "right", "tie", "both bad", "skip")

# What a record must have, by its kind. A choice also has the `prompt`; `left` and `right` are {"answer", "source"}.
FIELDS: dict[str, dict[str, type]] = {
    "choice": {"id": int, "annotator": str, "pair": str, "left": dict, "right": dict, "choice": str},
    "undo": {"id": int, "annotator": str, "of": int},
}


class Contents(NamedTuple):
    """The records of a file, the bytes that they take, and a line about a last line that was cut ("": it was whole)."""

    records: list[Record]
    size: int
    remark: str


class Log:
    """A file of records, held by one process. Made by `open_log`; `append` is not for several threads at once."""

    def __init__(self, path: Path, handle: int, contents: Contents):
        self.path = path
        self.records = contents.records
        self.remark = contents.remark
        self._handle = handle
        self._size = contents.size

    def append(self, record: Mapping[str, Any]) -> Record:
        """Add a record with its `id`, one more than the last one's, and wait until the disk has it.

        A record that could not be written whole leaves the file as it was. Raises OSError (a full disk).
        """
        last = self.records[-1]["id"] if self.records else 0
        numbered = {"id": last + 1, **record}
        line = (json.dumps(numbered) + "\n").encode()
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
    """Hold a file of records alone, made if there is none. What is left of a last line that was cut is taken away.

    The lock dies with the process, however it dies. Raises UserError while another process holds the file, and where
    a line of it is no record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock_file(handle, path, "--labels FILE"):
            raise UserError(
                f"{path} is in use by another `lm label`: open its page, stop it, or name another file (--labels FILE)"
            )
        _sync_folder(path.parent)
        contents = read_log(path)
        if os.fstat(handle).st_size != contents.size:
            os.ftruncate(handle, contents.size)
        _end_last_line(handle, contents.size)
        yield Log(path, handle, contents._replace(size=os.fstat(handle).st_size))
    finally:
        os.close(handle)


def read_log(path: Path) -> Contents:
    """The records of a file that somebody may be writing. A last line that is no whole record is passed over.

    Raises UserError where any other line is no record.
    """
    content = path.read_bytes()
    records: list[Record] = []
    size = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        record = _parse(line)
        if record is None and line.strip():
            if size + len(line) == len(content) and not line.endswith(b"\n"):
                start = line.decode(errors="replace")
                return Contents(
                    records, size, f"{path} line {number} was cut while it was written and is dropped: {start!r:.60}"
                )
            raise UserError(f"{path} line {number} is not a record of a choice: mend or remove that line")
        size += len(line)
        if record is not None:
            records.append(record)
    return Contents(records, size, "")


def _parse(line: bytes) -> Record | None:
    """A record, or None: a line that is none, or only the beginning of one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("kind") not in FIELDS:
        return None
    if not all(isinstance(record.get(name), kind) for name, kind in FIELDS[record["kind"]].items()):
        return None
    if record["kind"] == "choice":
        whole = record["choice"] in CHOICES and "prompt" in record and all("answer" in record[s] for s in CHOICES[:2])
        return record if whole else None
    return record


def _end_last_line(handle: int, size: int) -> None:
    """A last record that is whole but for its newline gets one."""
    if size and os.pread(handle, 1, size - 1) != b"\n":
        _write(handle, b"\n", size)


def _write(handle: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(handle, data, at)
        data, at = data[written:], at + written
    os.fsync(handle)


def _sync_folder(folder: Path) -> None:
    """A file that was just made is still there after the power goes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
