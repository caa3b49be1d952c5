"""Ctrl-C and SIGTERM as a flag that the training loop reads between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """`requested` is the name of the signal that came ("SIGINT", "SIGTERM"), None while none has."""

    requested: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, the first SIGINT or SIGTERM only sets `stop.requested`; a further SIGINT raises KeyboardInterrupt.

    The handlers of before are put back at the end. Main thread only (Python delivers signals nowhere else).
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.requested is None:
            stop.requested = signal.Signals(number).name
            # print() is not safe here: the signal may have come in the middle of one.
            os.write(2, f"\n{stop.requested}: stopping after this step (Ctrl-C stops at once)\n".encode())

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
