"""The data cache: folders of arrays keyed by what they are computed from, shared by runs and by hosts.

An entry is written to a draft folder, its manifest of sizes and checksums last, and the folder is renamed when complete: a
kill at any moment leaves no partial entry. When a process first opens an entry, it verifies the checksums; a damaged entry is
rebuilt. One process builds an entry while the others wait; its lock ends with the process. On a file system without locks, two
processes may build the same entry; the results are equal and one is kept. The lock only saves work.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lm.experiment import UserError
from lm.shapes import is_count, is_text
from lm.stored import NO_LOCKS, cache_folder, file_sha256, read_json, sealed, unsealed

VERSION = 14  # of the stored arrays and of the conversion of rows to tokens: raise it when either changes
TOLD_SECONDS = 1.0  # after this time a process that waits for another one prints a line
ABANDONED_SECONDS = 86_400.0
SETTLED_SECONDS = 2.0  # a file modified more recently may change again without a new mtime
MAPPED = 512  # files mapped at the same time; each takes a file descriptor
MANIFEST = "manifest.json"


def current_cache() -> Cache:
    """The cache in the folder that `cache_at` names."""
    return Cache(cache_folder())


@dataclass(frozen=True)
class Entry:
    """A complete cache entry: `array(name)` maps a file into memory; `span` reads a part of a file and closes it."""

    folder: Path
    files: Mapping[str, Mapping[str, Any]]

    def path(self, name: str) -> Path:
        return self.folder / name

    def length(self, name: str) -> int:
        return int(self.described(name)["shape"][0])

    def described(self, name: str) -> Mapping[str, Any]:
        """What the manifest says of an array. Raises UserError if a manifest that was not written here lacks it."""
        if name not in self.files:
            raise UserError(
                f"{self.folder / MANIFEST} has no array {name!r}: remove {self.folder}, and it is built again"
            )
        return self.files[name]

    def array(self, name: str) -> np.ndarray:
        file = self.described(name)
        return _mapped(self.path(name), file["dtype"], tuple(file["shape"]))

    def span(self, name: str, start: int, stop: int) -> np.ndarray:
        dtype, shape = np.dtype(self.described(name)["dtype"]), self.described(name)["shape"]
        width = int(np.prod(shape[1:], dtype=np.int64))
        flat = np.fromfile(self.path(name), dtype, (stop - start) * width, offset=start * width * dtype.itemsize)
        return flat.reshape(-1, *shape[1:])


@functools.lru_cache(maxsize=MAPPED)
def _mapped(file: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(file, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)


class Writer:
    """Writer of a draft entry: appends to arrays on disk without holding them in memory."""

    def __init__(self, cache: Cache, folder: Path):
        self._cache, self._folder = cache, folder
        self._streams: dict[str, Any] = {}
        self._hashes: dict[str, Any] = {}
        self._kinds: dict[str, tuple[str, list[int]]] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        """Append rows to array `name`; all rows have one dtype and width."""
        data = np.ascontiguousarray(array)
        with self._cache.writing():
            if name not in self._streams:
                self._streams[name] = (self._folder / name).open("wb")
                self._hashes[name] = hashlib.sha256()
                self._kinds[name] = (data.dtype.str, [0, *data.shape[1:]])
            self._streams[name].write(data.data)
        self._hashes[name].update(data.data)
        self._kinds[name][1][0] += len(data)

    def flushed(self, name: str) -> Path:
        """Path of array `name`'s file, after flushing what was appended so far."""
        with self._cache.writing():
            self._streams[name].flush()
        return self._folder / name

    def finish(self, made_of: Mapping[str, Any]) -> dict[str, Any]:
        """Flush all files to disk, write the manifest last, and return the description of the files."""
        files = {}
        with self._cache.writing():
            for name, stream in self._streams.items():
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
                dtype, shape = self._kinds[name]
                checksum = _checksum(self._hashes[name], dtype, shape)
                files[name] = {"dtype": dtype, "shape": shape, "bytes": size, "sha256": checksum}
            with (self._folder / MANIFEST).open("w", encoding="utf-8") as manifest:
                json.dump(sealed(_content(made_of, files)), manifest, indent=1)
                manifest.flush()
                os.fsync(manifest.fileno())
        return files

    def close(self) -> None:
        for stream in self._streams.values():
            with contextlib.suppress(OSError):  # a full disk has been reported already, and the draft will be removed
                stream.close()


@dataclass(frozen=True)
class Cache:
    """A folder of cache entries, and of the checksums of unchanged source files."""

    folder: Path

    def entry(self, kind: str, made_of: Mapping[str, Any], build: Callable[[Writer], None], label: str) -> Entry:
        """The entry computed from `made_of` (a plain value that determines it), built by `build` if it does not exist.

        If another process is building it, this process waits and prints `label`. Raises UserError if the folder
        must be written and cannot be.
        """
        key = hashlib.sha256(json.dumps([VERSION, kind, made_of], sort_keys=True).encode()).hexdigest()[:40]
        folder = self.folder / f"{kind}-{key}"
        if (found := self._open(folder, made_of)) is not None:
            return found
        with self._alone(folder, label):
            # Another process may have built it while this one waited for the lock.
            return self._open(folder, made_of) or self._build(folder, made_of, build)

    def digest(self, file: Path) -> str:
        """SHA-256 of a file's content; a file with an unchanged size, mtime, ctime and inode is not read again."""
        file = file.absolute()
        known, now = self._known(file), _stamp(file)
        if known is not None and known[:-1] == now:
            return known[-1]
        found = file_sha256(file)
        if time.time() - max(now[1], now[2]) / 1e9 > SETTLED_SECONDS and _stamp(file) == now:
            with contextlib.suppress(UserError):  # a read-only cache: the file is hashed again next time
                self._remember(file, found)
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context that turns an OSError into a UserError that says what to do."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} cannot be written: {error.strerror}; make room or set its rights there, or name "
                "another folder with --cache DIR"
            ) from error

    def _open(self, folder: Path, made_of: Mapping[str, Any]) -> Entry | None:
        """The entry if it exists and is intact; a damaged one is reported and set aside."""
        if not folder.exists():
            return None
        damage, files = _damage(folder, made_of)
        if not damage:
            return Entry(folder, files)
        print(f"lm: {folder / damage} is damaged: rebuilding it", file=sys.stderr, flush=True)
        aside = _draft(folder)
        with self.writing():
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        _mapped.cache_clear()  # arrays of the damaged entry may be mapped
        return None

    def sweep(self) -> None:
        """Remove drafts of dead processes on this host, and drafts untouched for a day."""
        for draft in [*self.folder.glob("*.draft"), *self.folder.glob("checksums/*.draft")]:
            if _is_abandoned(draft):
                with contextlib.suppress(OSError):  # another user's file, which only that user can remove
                    shutil.rmtree(draft) if draft.is_dir() else draft.unlink()

    def _build(self, folder: Path, made_of: Mapping[str, Any], build: Callable[[Writer], None]) -> Entry:
        draft = _draft(folder)
        with self.writing():
            draft.mkdir()
        writer = Writer(self, draft)
        try:
            build(writer)
            files = writer.finish(made_of)
            with self.writing():
                try:
                    draft.rename(folder)
                except OSError:
                    if not (folder / MANIFEST).exists():
                        raise
        finally:
            writer.close()
            shutil.rmtree(draft, ignore_errors=True)  # after a success it no longer exists
        _verified[folder] = _stamps(folder, files)
        return Entry(folder, files)

    @contextlib.contextmanager
    def _alone(self, folder: Path, label: str) -> Iterator[None]:
        """Context in which no other process builds this entry, after removing drafts of killed processes."""
        lock = folder.with_name(f"{folder.name}.lock")
        held = FileLock(lock, fallback_to_soft=False)
        try:
            with self.writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._acquire(held, lock, label)
            yield
        finally:
            if held.is_locked:
                lock.unlink(missing_ok=True)  # processes that wait for the removed file open a new one
            held.release()

    def _acquire(self, held: FileLock, lock: Path, label: str) -> None:
        """Take the lock, and print which process holds it while waiting; go on without it if the file system has no locks."""
        who = "another process"
        try:
            try:
                held.acquire(timeout=TOLD_SECONDS)
            except Timeout:
                with contextlib.suppress(FileNotFoundError):
                    who = lock.read_text("utf-8", errors="replace") or who
                print(f"{label}: waiting for {who}, which is building the same entry", file=sys.stderr, flush=True)
                held.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"{label}: {lock.parent} has no file locks: processes may build it at the same time",
                file=sys.stderr,
                flush=True,
            )
            return
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        for draft in lock.parent.glob(f"{lock.stem}.*.draft"):
            shutil.rmtree(draft, ignore_errors=True)

    def _record(self, file: Path) -> Path:
        return self.folder / "checksums" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:40]}.json"

    def _known(self, file: Path) -> list[Any] | None:
        """The recorded [size, mtime, ctime, inode, sha256] of a file."""
        try:
            record = json.loads(self._record(file).read_text("utf-8"))
            return record["of"][1:] if unsealed(record) is not None else None
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return None

    def _remember(self, file: Path, digest: str) -> None:
        record = self._record(file)
        draft = _draft(record)
        with self.writing():
            record.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_text(json.dumps(sealed({"of": [str(file), *_stamp(file), digest]})), "utf-8")
                draft.rename(record)
            finally:
                draft.unlink(missing_ok=True)


_verified: dict[Path, list[list[int]]] = {}
"""Entries that this process has verified: folder → stamps of its files at that time."""


def _damage(folder: Path, made_of: Mapping[str, Any]) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
    """(the first file of an entry that differs from its manifest, "" for none; the manifest's files)."""
    try:
        content = read_json(folder / MANIFEST)
    except UserError:
        return MANIFEST, {}
    manifest = unsealed(content) if isinstance(content, dict) else None
    files = (manifest or {}).get("files")
    if not isinstance(files, dict) or not all(map(_is_array, files.values())) or manifest != _content(made_of, files):
        return MANIFEST, {}
    if not {MANIFEST, *files} >= {file.name for file in folder.iterdir()}:
        return MANIFEST, {}
    for name, file in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != file["bytes"]:
            return name, files
    stamps = _stamps(folder, files)
    if _verified.get(folder) != stamps:
        for name, file in files.items():
            try:
                with (folder / name).open("rb") as stream:
                    found = _checksum(hashlib.file_digest(stream, "sha256"), file["dtype"], file["shape"])
            except OSError:
                found = ""
            if found != file["sha256"]:
                return name, files
        _verified[folder] = stamps
    return "", files


def _checksum(content: Any, dtype: str, shape: list[int]) -> str:
    """The checksum of an array by the hash of its bytes: of dtype and shape too, as the bytes alone could be read as others."""
    content.update(json.dumps([dtype, shape]).encode())
    return content.hexdigest()


def _content(made_of: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says, in the types that JSON gives back."""
    return json.loads(json.dumps({"version": VERSION, "made_of": made_of, "files": files}))


def _is_array(file: Any) -> bool:
    """Whether a value of a manifest describes the file of an array, and its size agrees."""
    try:
        size = math.prod(file["shape"]) * np.dtype(file["dtype"]).itemsize
        sizes = [file["bytes"], *file["shape"]]
        return sizes[0] == size and len(sizes) > 1 and all(map(is_count, sizes)) and is_text(file["sha256"])
    except (KeyError, TypeError, ValueError):
        return False


def _stamps(folder: Path, files: Mapping[str, Any]) -> list[list[int]]:
    return [_stamp(folder / name) for name in (MANIFEST, *files)]


def _here() -> str:
    """This process as part of a draft's name: host hash and process id."""
    return f"{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-{os.getpid()}"


def _draft(path: Path) -> Path:
    """A draft path beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.{_here()}.{secrets.token_hex(4)}.draft")


def _is_abandoned(draft: Path) -> bool:
    """Whether a draft is abandoned: its process on this host has ended, or a day has passed."""
    host, _, number = draft.suffixes[-3].removeprefix(".").partition("-") if len(draft.suffixes) > 2 else ("", "", "")
    if f"{host}-{os.getpid()}" == _here() and number.isdecimal():
        try:
            os.kill(int(number), 0)
        except (
            ProcessLookupError,
            PermissionError,
            OverflowError,
        ) as error:  # PermissionError: another user's live process
            return isinstance(error, ProcessLookupError)
        return False
    try:
        return time.time() - draft.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
