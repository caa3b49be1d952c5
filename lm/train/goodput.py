"""Goodput accounting: where a stage's time goes, over all sessions; time lost to a kill is found at the next start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from lm.shapes import is_number
from lm.stored import read_record, write_sealed
from lm.train.metrics import read_lines

# Categories other than steps, in seconds, as in the summary; `step_seconds` is the rest.
PARTS = (
    "start_seconds",
    "compile_seconds",
    "data_seconds",
    "sample_seconds",
    "eval_seconds",
    "save_seconds",
    "lost_seconds",
)


class Costs:
    """Seconds by category (PARTS), summed over all sessions of a stage.

    The time between a session's last checkpoint and its last line of metrics.jsonl was lost to a kill, and so is the
    time that a session needs to resume: both count as `lost_seconds`.

    Args:
        began: time.monotonic() when this session's work on the stage began.
        saved: the seconds in the checkpoint that the stage resumes from; empty at its start.
        reached: total seconds that earlier sessions are known to have spent.
    """

    def __init__(self, began: float, saved: dict[str, float], reached: float):
        self.seconds = {name: value for name, value in saved.items() if name not in ("seconds", "step_seconds")}
        self.before = max(saved.get("seconds", 0.0), reached)
        self.began = began
        self._add("lost_seconds", self.before - saved.get("seconds", 0.0))
        self._add("lost_seconds" if self.before else "start_seconds", time.monotonic() - began)

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Context that accounts its time under `name`."""
        began = time.monotonic()
        yield
        self.add(name, began)

    def add(self, name: str, since: float) -> None:
        self._add(name, time.monotonic() - since)

    def total(self) -> dict[str, float]:
        """All categories, the total as `seconds`, and the remainder as `step_seconds`."""
        seconds = self.before + time.monotonic() - self.began
        parts = sum(self.seconds.get(name, 0.0) for name in PARTS)
        return self.seconds | {"seconds": seconds, "step_seconds": max(seconds - parts, 0.0)}

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def seconds_spent(folder: Path) -> float:
    """Seconds that earlier sessions are known to have spent on a stage; to be read before its metrics are rewound."""
    kept = read_record(_file(folder), {"seconds": is_number}, "remove it")["seconds"] if _file(folder).exists() else 0.0
    times = (line.get("time") for line in read_lines(folder / "metrics.jsonl"))
    return max([kept, *(time for time in times if isinstance(time, int | float))])


def store_seconds_spent(folder: Path, seconds: float) -> None:
    """Store the seconds in time.json, since rewinding removes them from metrics.jsonl."""
    if seconds:
        write_sealed(_file(folder), {"seconds": seconds})


def _file(folder: Path) -> Path:
    return folder / "time.json"
