"""The thread that owns the engines: takes completions from the queue, makes them step, and ends those whose time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from lm.serve.completions import LiveCompletion
from lm.serve.protocol import Refused
from lm.serve.slot_engine import SlotEngine

LOOK_SECONDS = 0.25  # between two looks for completions whose time is over


class Scheduler:
    """Completions of several models, in the order in which they came; at most `queue` wait for a slot.

    Args:
        after_turn: called after each turn of an engine with the model's name and its number of tokens.
    """

    def __init__(
        self, engines: Mapping[str, SlotEngine], queue: int, after_turn: Callable[[str, int], None] = lambda *_: None
    ):
        self.engines, self.queue = dict(engines), queue
        self.failure: BaseException | None = None
        self._after_turn = after_turn
        self._arrived: list[tuple[str, LiveCompletion]] = []
        self._changed = threading.Condition()
        self._ending = False
        self._looked = 0.0
        self._thread = threading.Thread(target=self._run, name="lm serve: engine", daemon=True)

    def start(self) -> None:
        """Begin the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its turn; what is in the queue or in a slot is not finished."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def waiting(self) -> int:
        """Number of completions that wait for a slot."""
        return len(self._arrived) + sum(len(engine.waiting) for engine in self.engines.values())

    def submit(self, model: str, completions: Sequence[LiveCompletion]) -> None:
        """Put a request's completions into the queue.

        Raises:
            Refused: they would never fit, or do not fit now, or the engine has failed.
        """
        engine = self.engines[model]
        most = engine.sizes.slots + self.queue
        if len(completions) > most:
            raise Refused(f"the request asks for {len(completions)} completions; this server takes at most {most}", "n")
        with self._changed:
            if self.failure is not None:
                raise Refused("the engine has failed; the server is ending", status=503)
            free = engine.sizes.slots - engine.running
            if self.waiting() + len(completions) > max(0, free) + self.queue:
                raise Refused(
                    f"{self.waiting()} completions are waiting, and the queue has {self.queue} places: try again later",
                    status=429, code="queue_full", kind="rate_limit_error",
                )  # fmt: skip
            for one in completions:
                one.arrived = engine.steps
                self._arrived.append((model, one))
            self._changed.notify()

    def cancel(self, completions: Sequence[LiveCompletion]) -> None:
        """Give up completions whose client has gone."""
        with self._changed:
            for one in completions:
                one.cancelled = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._take():
                self._end_late()
                for name, engine in self.engines.items():
                    if engine.busy:
                        self._after_turn(name, engine.turn(self._arrive))
        except BaseException as error:
            with self._changed:
                self.failure = error
                self._move()
            for one in self._all():
                one.fail(Refused("the engine has failed; the server is ending", status=500))
            raise

    def _take(self) -> bool:
        """Wait until there is something to do, and move what has arrived to its engine; False at the end."""
        with self._changed:
            while not (self._ending or self._arrived or any(engine.busy for engine in self.engines.values())):
                self._changed.wait()
            self._move()
            return not self._ending

    def _arrive(self) -> None:
        with self._changed:
            self._move()

    def _move(self) -> None:
        for name, one in self._arrived:
            self.engines[name].waiting.append(one)
        self._arrived = []

    def _end_late(self) -> None:
        now = time.monotonic()
        if now < self._looked + LOOK_SECONDS:
            return
        self._looked = now
        for one in self._all():
            if one.deadline < now:
                one.fail(
                    Refused("the request's time is over (lm serve --timeout)", status=504, code="timeout")
                )  # fmt: skip

    def _all(self) -> list[LiveCompletion]:
        return [one for engine in self.engines.values() for one in engine.completions()]
