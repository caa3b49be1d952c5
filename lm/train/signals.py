"""Turns SIGINT, SIGTERM and preemption notices into a flag, read between two steps and within evaluations and rollouts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedBySignal(Exception):
    """Raised when a signal arrives during an evaluation or a rollout."""


@dataclass
class Stop:
    """Stop request: `requested` is the name of the signal that this process received ("SIGINT", "SIGTERM"), or None."""

    requested: str | None = None
    asked: int = 0  # number of calls of `now`, which is the same on all processes

    def now(self) -> str | None:
        """The reason to stop now, or None. All processes must call it at the same points.

        A signal to one process is enough: jax then picks a later call (sync point) that no process has reached yet, at
        which all of them stop. Until then a call costs nothing.
        """
        if jax.process_count() == 1:
            return self.requested
        self.asked += 1
        if not multihost_utils.reached_preemption_sync_point(self.asked):
            return None
        return f"{self.requested or 'SIGTERM'} to one of {jax.process_count()} processes"

    def check(self) -> None:
        """Raise StoppedBySignal, with the reason, if it is time to stop; as for `now`, on all processes at the same points."""
        if reason := self.now():
            raise StoppedBySignal(reason)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Context in which the first SIGINT or SIGTERM sets `stop.requested`, and a second SIGINT raises KeyboardInterrupt.

    The previous handlers are restored at the end. Main thread only, since Python delivers signals only there. With
    several processes jax handles SIGTERM itself and tells the other processes, and a SIGINT is sent on as a SIGTERM.
    """
    stop = Stop()
    alone = jax.process_count() == 1

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.requested is None:
            stop.requested = signal.Signals(number).name
            # print() is not reentrant: the signal may have interrupted one.
            os.write(2, f"\n{stop.requested}: saving a checkpoint, then stopping (Ctrl-C stops at once)\n".encode())
            if not alone:
                os.kill(os.getpid(), signal.SIGTERM)

    handled = SIGNALS if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
