"""A thread that ends the process when a step takes too long, since a stuck collective would wait for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

EXIT_STUCK = 75  # EX_TEMPFAIL: run the same command again
DEFAULT_SECONDS = 900.0
PATIENCE = 4.0  # factor on the time limit for compiling, restoring and evaluating


@dataclass(frozen=True)
class _Expected:
    what: str
    until: float  # time.monotonic()
    seconds: float


class Watchdog:
    """Context in which a task that exceeds its time limit ends the process, with the task and all threads' stacks printed.

    Args:
        seconds: time limit of a step; None: no limit.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._expected: _Expected | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect(self, what: str, patience: float = 1.0) -> None:
        """Start the time limit of the next task, which replaces the current one.

        Args:
            what: description of the task.
            patience: factor on the time limit of a step.
        """
        if self.seconds is not None:
            limit = self.seconds * patience
            self._expected = _Expected(what, time.monotonic() + limit, limit)

    @contextlib.contextmanager
    def patiently(self, what: str) -> Iterator[None]:
        """Context of a task with PATIENCE times the limit; after it the previous task's limit starts again."""
        before = self._expected
        self.expect(what, PATIENCE)
        yield
        self._expected = (
            None if before is None else _Expected(before.what, time.monotonic() + before.seconds, before.seconds)
        )

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._closed.wait(min(self.seconds / 10, 10.0)):
            expected = self._expected
            if expected is not None and time.monotonic() > expected.until:
                _end(expected)


def _end(expected: _Expected) -> None:
    process = f"process {jax.process_index()} of {jax.process_count()}"
    print(
        f"\nlm: error: {process} waited {expected.seconds:g} seconds for {expected.what} (--watchdog): stopped, so that "
        "the same command can resume from the last checkpoint. The stacks of all threads:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_STUCK)
