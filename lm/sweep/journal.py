"""The journal of a study after a crash: what of it is sound stays, what is not is counted and kept beside it."""

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
    """Entries of a journal in memory, of which the first `count` are shown."""

    def __init__(self, entries: list[Entry], count: int):
        self.entries, self.count = entries, count

    def read_logs(self, log_number_from: int) -> Iterator[Entry]:
        return iter(self.entries[log_number_from : self.count])

    def append_logs(self, logs: list[Entry]) -> None:
        raise NotImplementedError("a journal that is looked at is not written")


def _lock(path: Path) -> Any:
    """One writer at a time; unlike Optuna's own locks, which stay for half a minute, this one ends with its process."""
    return FileLock(path.with_name(f"{path.name}.writer"), poll_interval=0.01, fallback_to_soft=False)


def storage(path: Path) -> JournalStorage:
    """The study's storage in a journal file."""
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_lock(path)))


def recover(path: Path) -> str:
    """Cut a journal after its last sound line, and say so in a line; "" where all of it is sound.

    Later lines depend on the earlier ones (a trial goes by its place), so nothing after a damaged line can be believed. The
    journal as it was is kept as `journal.log.damaged`.

    Raises:
        UserError: the path is no file.
    """
    if not path.exists():
        return ""
    if not path.is_file():
        raise UserError(f"{path} is not a file; it should be the journal of the sweep: move it away")
    with _lock(path):  # a line that another worker is writing is not half a line
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
        f"(all of it is kept in {path.name}.damaged); trials that had ended are found again in their folders"
    )


def sound_lines(content: bytes) -> list[bytes]:
    """The lines before the first that is cut, no JSON, or nothing that a study can replay."""
    lines, entries = [], []
    for line in content.split(b"\n")[:-1]:  # what follows the last newline is a line that was cut
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        lines.append(line + b"\n")
        entries.append(entry)
    return lines[: _replayable(entries)]


def _replayable(entries: list[Entry]) -> int:
    """How many entries, from the first on, Optuna can replay."""
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
    except Exception:  # whatever replaying an entry raises that Optuna did not write, it is no entry
        return False
    return True
