"""Ctrl-C, SIGTERM and a platform's notice of preemption as a flag that the training loop reads between two steps."""

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


@dataclass
class Stop:
    """`requested` is the name of the signal that came to this process ("SIGINT", "SIGTERM"), None while none has."""

    requested: str | None = None
    asked: int = 0  # times that `now` was asked

    def now(self) -> str | None:
        """Why the run should stop here, or None. Of several processes every one asks at the same places.

        One of them being told to stop is enough: they agree in the background on a place that none has passed yet, and
        it costs them nothing until then.
        """
        if jax.process_count() == 1:
            return self.requested
        self.asked += 1
        if not multihost_utils.reached_preemption_sync_point(self.asked):
            return None
        return f"{self.requested or 'SIGTERM'} to one of {jax.process_count()} processes"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, the first SIGINT or SIGTERM only sets `stop.requested`; a further SIGINT raises KeyboardInterrupt.

    The handlers of before are put back at the end. Main thread only (Python delivers signals nowhere else). Among
    several processes jax has its own handler of SIGTERM, which tells the others; a SIGINT becomes a SIGTERM.
    """
    stop = Stop()
    alone = jax.process_count() == 1

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.requested is None:
            stop.requested = signal.Signals(number).name
            # print() is not safe here: the signal may have come in the middle of one.
            os.write(2, f"\n{stop.requested}: stopping after this step (Ctrl-C stops at once)\n".encode())
            if not alone:
                os.kill(os.getpid(), signal.SIGTERM)

    handled = SIGNALS if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
