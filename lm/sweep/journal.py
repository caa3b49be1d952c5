"""Journal file of a study: storage with a lock, and recovery after a crash, which cuts it at the first damaged line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from lm.experiment import UserError

Entry = dict[str, Any]


class _Entries(BaseJournalBackend):
    """A read-only Optuna journal in memory, of which the first `count` entries are visible."""

    def __init__(self, entries: list[Entry], count: int):
        self.entries, self.count = entries, count

    def read_logs(self, log_number_from: int) -> Iterator[Entry]:
        return iter(self.entries[log_number_from : self.count])

    def append_logs(self, logs: list[Entry]) -> None:
        raise NotImplementedError("this journal is read-only")


def _lock(path: Path) -> Any:
    """Lock for one writer at a time that ends with its process (Optuna's own locks outlive it by half a minute)."""
    return FileLock(path.with_name(f"{path.name}.writer"), poll_interval=0.01, fallback_to_soft=False)


def storage(path: Path) -> JournalStorage:
    """Optuna storage in a journal file."""
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_lock(path)))


def recover(path: Path) -> str:
    """Cut a journal before its first damaged line; returns a message about it, or "" if the journal is intact.

    Later lines refer to earlier ones (a trial's number is its position), so all lines after a damaged one are dropped.
    The original is kept as `journal.log.damaged`.

    Raises:
        UserError: the path is not a file.
    """
    if not path.exists():
        return ""
    if not path.is_file():
        raise UserError(f"{path} is not a file; it should be the journal of the sweep: move it away")
    with _lock(path):  # otherwise a line that another worker is writing would look truncated
        content = path.read_bytes()
        sound = sound_lines(content)
        kept = b"".join(sound)
        if kept == content:
            return ""
        path.with_name(f"{path.name}.damaged").write_bytes(content)
        with path.open("r+b") as stream:
            stream.truncate(len(kept))
    lost = len(content[len(kept) :].splitlines())
    return (
        f"{path} is damaged from line {len(sound) + 1} on: {lost} {'line' if lost == 1 else 'lines'} left out "
        f"(the original is kept in {path.name}.damaged); finished trials are recovered from their folders"
    )


def sound_lines(content: bytes) -> list[bytes]:
    """The lines before the first that is truncated, is not JSON, or cannot be replayed by Optuna."""
    lines, entries = [], []
    for line in content.split(b"\n")[:-1]:  # content after the last newline is a truncated line
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        lines.append(line + b"\n")
        entries.append(entry)
    return lines[: _replayable(entries)]


def _replayable(entries: list[Entry]) -> int:
    """Number of leading entries that Optuna can replay."""
    whole = _Entries(entries, len(entries))
    if _works(lambda: JournalStorage(whole).get_all_studies()):
        return len(entries)
    some = _Entries(entries, 0)
    storage = JournalStorage(some)
    while some.count < len(entries):
        some.count += 1
        if not _works(storage.get_all_studies):
            return some.count - 1
    return len(entries)


def _works(replay: Callable[[], Any]) -> bool:
    try:
        replay()
    except Exception:  # an entry that Optuna did not write may raise anything
        return False
    return True
