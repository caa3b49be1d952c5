"""Durable files: atomic writes, sealed JSON files with a checksum, file locks, and the cache folder."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm.config.field import UserError, shown
from lm.shapes import Shape, misfit

LONGEST_PATH = 400  # characters of a path that an error shows
SEAL = "sha256"
"""The field of a sealed JSON object that has the SHA-256 of the rest of it."""

# Errors of flock() on a file system without locks: Lustre without `-o flock`, NFS without a lock daemon, some FUSE ones.
ENOTSUPP = 524  # of the Linux kernel; Python's errno has no name for it
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, ENOTSUPP)
LOOK_SECONDS = 0.1  # after this time a lock is asked for again, since `is_locked` holds it for an instant
_cache: contextvars.ContextVar[Path | None] = contextvars.ContextVar("cache folder", default=None)


@contextlib.contextmanager
def cache_at(folder: Path | None) -> Iterator[None]:
    """Context in which the cache is in `folder` (None: the default). Raises UserError if `folder` cannot be made."""
    if folder is not None:
        make_folder(folder.expanduser(), "--cache DIR")
    token = _cache.set(folder)
    try:
        yield
    finally:
        _cache.reset(token)


def cache_folder() -> Path:
    """The folder of `cache_at`, else `lm` in XDG_CACHE_HOME, else in ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm"
    return (_cache.get() or default).expanduser().absolute()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The object with its checksum as the first field."""
    return {SEAL: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), **content}


def unsealed(content: dict[str, Any]) -> dict[str, Any] | None:
    """A sealed object without its checksum; None if the checksum is missing or wrong."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    return rest if sealed(rest)[SEAL] == content.get(SEAL) else None


def write_atomic(path: Path, content: bytes) -> Path:
    """Write a file atomically, so that a reader or a kill sees the old or the new content; returns its path."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary.replace(path)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as JSON with `write_atomic`."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, f"{text}\n".encode())


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write an object with its checksum as JSON with `write_atomic`."""
    write_json_atomic(path, sealed(json.loads(json.dumps(content))))


def make_folder(path: Path, flag: str) -> None:
    """Make a folder and its missing parents.

    Args:
        flag: command-line flag that names another folder, for the error.

    Raises:
        UserError: a file is in the way, the name is too long, or the system refuses it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {shown(str(path), LONGEST_PATH)} cannot be made: {error.strerror}; name another one ({flag})"
        ) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which gets this name when the context ends without an exception.

    Raises:
        UserError: there is something at `path` that is no empty folder, or it cannot be written.
    """
    path = path.expanduser().resolve()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is no empty folder: name a new one")
        draft = path.with_name(f".{path.name}.unfinished")
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        draft.mkdir(parents=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{shown(str(path), LONGEST_PATH)} cannot be written: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError, with the line, if it is broken or missing."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unrepeated)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error or type(error).__name__}") from error


def unrepeated(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a repeated key, of which `json` would keep the last."""
    found = dict(members)
    if len(found) < len(members):
        keys = [key for key, _ in members]
        raise ValueError(
            f"the key {shown(next(key for key in found if keys.count(key) > 1))} appears twice in one object"
        )
    return found


def read_sealed(path: Path) -> dict[str, Any]:
    """Read an object written by `write_sealed`, without its checksum; files of an older lm without a checksum are accepted.

    Raises:
        UserError: the file is missing, holds no object, or does not match its checksum.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; put back a copy of it")
    if SEAL not in content:
        return content
    rest = unsealed(content)
    if rest is None:
        raise UserError(f"{path} is damaged: it does not match its own checksum; put back a copy of it")
    return rest


def read_record(path: Path, shape: Mapping[str, Shape], remedy: str = "put back a copy of it") -> dict[str, Any]:
    """`read_sealed` for an object of this shape, as a program that is not this one may have written another under a right seal.

    Raises:
        UserError: as `read_sealed`, or a field is missing or of another type; names the field and the remedy.
    """
    found = read_sealed(path)
    if fault := misfit(found, shape):
        raise UserError(f"{path} is damaged: its {fault:.80} cannot be read; {remedy}")
    return found


def take_lock(file: Path, flag: str, wait: bool = False) -> int | None:
    """Open a file (created if missing) and lock it; returns its descriptor, or None if another process has the lock.

    The lock ends when the descriptor is closed, at the latest with the process. Two properties that `filelock` lacks: a child
    that inherits the descriptor holds the lock too, and the locked file may have content.

    Args:
        flag: command-line flag that names another folder or file, for the error.
        wait: whether to wait until the other process releases the lock.

    Raises:
        UserError: the file system has no locks.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        if error.errno not in NO_LOCKS:
            raise
        reason = error.strerror if error.errno != ENOTSUPP else "Operation not supported"
        raise UserError(
            f"{file} cannot be locked ({reason}): its file system has no file locks; name a place on another one ({flag})"
        ) from error
    return handle


def is_locked(file: Path) -> bool:
    """Whether a process has the lock of `take_lock`; the file is only read, so that its folder may be read-only.

    On a file system without locks no process has one, since `take_lock` refuses there.
    """
    try:
        with file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: NFS grants an exclusive one only to writers
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOENT, *NO_LOCKS):
            raise
    return False
