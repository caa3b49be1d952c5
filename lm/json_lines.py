"""Append-only JSON-lines files with a checksum of every line in a second file: NAME.jsonl and NAME.jsonl.crc32.

A line is written before its checksum, so a kill leaves at most lines without one, which are accepted. A line that does not
match its checksum, or is missing, is detected.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.config.field import UserError
from lm.stored import write_atomic

TAIL = 1 << 16  # bytes at the end of a file that hold its last line
RETRY_SECONDS = 0.2  # after this time a reader reads again, since the file may just have been replaced


class JsonLines:
    """A JSON-lines file opened for appending."""

    def __init__(self, path: Path):
        """Open the file (created if missing) and remove a truncated last line, which a kill may have left."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        sums = _checksums_of(whole)
        path.touch()  # before its checksums, which without it would say that it is gone
        if not checksums(path).exists() or len(checksums(path).read_bytes()) != len(sums):
            checksums(path).write_bytes(sums)
        self._lines, self._sums = (file.open("ab", buffering=0) for file in (path, checksums(path)))
        self._lines.truncate(len(whole))

    def append(self, lines: Sequence[bytes]) -> None:
        """Append lines, each without its newline, in one write. Raises OSError, for instance on a full disk."""
        data = b"".join(line + b"\n" for line in lines)
        _write(self._lines, data)
        _write(self._sums, _checksums_of(data))

    def sync(self) -> None:
        """Wait until everything is on disk."""
        for stream in (self._lines, self._sums):
            os.fsync(stream.fileno())

    def close(self) -> None:
        self._lines.close()
        self._sums.close()


def checksums(path: Path) -> Path:
    """Path of the checksum file of a JSON-lines file."""
    return path.with_name(f"{path.name}.crc32")


def read_json_lines(path: Path, fields: Mapping[str, type] | None = None) -> list[tuple[bytes, dict[str, Any]]]:
    """(raw line, object) of a JSON-lines file, empty if there is no file. Text after the last newline is ignored.

    Args:
        fields: names and types of the fields that every object must have.

    Raises:
        UserError: a line differs from its checksum, is missing, is not JSON, or lacks a field; names file and line.
    """
    sums, lines = _read(path)
    if _first_difference(sums, lines) is not None:
        time.sleep(RETRY_SECONDS)
        sums, lines = _read(path)
    place = _first_difference(sums, lines)
    if place is not None:
        what = "does not match its checksum" if place < len(lines) else f"is gone: {len(sums)} lines were written"
        raise UserError(
            f"{path}:{place + 1} {what}; put back a copy of the file and of its .crc32, or remove {path.parent} to rebuild it"
        )
    found = []
    for number, raw in enumerate(lines, start=1):
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not valid JSON ({error}); remove that line") from error
        missing = [name for name, kind in (fields or {}).items() if not _has(value, name, kind)]
        if not isinstance(value, dict) or missing:
            what = f"no {missing[0]!r}" if missing else "no fields"
            raise UserError(f"{path}:{number} is not an object that was written here: it has {what}; remove that line")
        found.append((raw, value))
    return found


def read_last_line(path: Path) -> bytes:
    """The last whole line of a JSON-lines file, b"" without one; only the ends of the file and of its checksums are read.

    Raises:
        UserError: the line that was written last is gone, or does not match its checksum.
    """

    def ends() -> tuple[list[bytes], list[bytes]]:
        return _tail(checksums(path))[-1:], _tail(path)

    def intact(sums: list[bytes], lines: list[bytes]) -> bool:
        return sums[0] in map(_crc32, lines) if sums else True  # the lines after that one have no checksum yet

    sums, lines = ends()
    if not intact(sums, lines):
        time.sleep(RETRY_SECONDS)
        sums, lines = ends()
    if not intact(sums, lines):
        raise UserError(
            f"{path} has lost its last line, or it does not match its checksum; put back a copy of the file"
        )
    return lines[-1] if lines else b""


def rewrite_json_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Replace the content of the file; a kill at any moment leaves either all old lines or all new ones."""
    checksums(path).unlink(missing_ok=True)
    data = b"".join(line + b"\n" for line in lines)
    write_atomic(path, data)
    write_atomic(checksums(path), _checksums_of(data))


def _has(value: Any, name: str, kind: type) -> bool:
    found = value.get(name) if isinstance(value, dict) else None
    return isinstance(found, kind) and not (kind is int and isinstance(found, bool))


def _read(path: Path) -> tuple[list[bytes], list[bytes]]:
    """(checksums, lines); the checksums are read first, since a line is written before its checksum."""
    sums = b""
    with contextlib.suppress(FileNotFoundError):
        sums = checksums(path).read_bytes()
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        whole = b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return sums.split(b"\n")[:-1], whole.split(b"\n") if whole else []


def _tail(path: Path) -> list[bytes]:
    """The whole lines at the end of a file; none if it is missing."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL))
            return stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _first_difference(sums: list[bytes], lines: list[bytes]) -> int | None:
    """Index of the first line that is missing or does not match its checksum."""
    for place, expected in enumerate(sums):
        if place >= len(lines) or _crc32(lines[place]) != expected:
            return place
    return None


def _checksums_of(data: bytes) -> bytes:
    return b"".join(_crc32(line) + b"\n" for line in data.split(b"\n")[:-1])


def _crc32(line: bytes) -> bytes:
    return b"%08x" % zlib.crc32(line)


def _write(stream: Any, data: bytes) -> None:
    while data:  # an almost full disk accepts only a part
        data = data[stream.write(data) :]
