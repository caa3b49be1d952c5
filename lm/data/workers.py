"""A pool of worker processes for data, with results in order, bounded memory and one line of progress."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import Any, TypeVar

from lm.experiment import UserError
from lm.notebook import notebook_line
from lm.parent_death import end_with_parent, interrupt_blocked

Task = TypeVar("Task")
Result = TypeVar("Result")

WORTH_BYTES = 8 << 20  # less text than this is processed faster than a process starts
AT_ONCE = 8  # files processed at the same time
PLAIN_EVERY_SECONDS = 10.0

STOP = signal.SIGUSR1
"""The signal that ends a worker's task."""

# In a worker: the value shared by all of its tasks, whether it is in one, and whether the pool has stopped.
_shared: Any = None
_in_task = _stopped = False


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Processes(SpawnContext):
    """Starts the processes of a pool, and keeps them. Not forked: jax's threads do not survive a fork."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        self.started.append(SpawnProcess(*args, **options))
        return self.started[-1]


class WorkerPool:
    """A pool of worker processes, started for texts of at least WORTH_BYTES; each process receives `shared` once.

    A context manager; an exception ends the running tasks. Without worker processes, tasks run in the calling thread.
    """

    def __init__(
        self,
        label: str,
        unit: str,
        text_bytes: int,
        shared: Any = None,
        processes: int | None = None,
        slowness: int = 1,
    ):
        self.shared = shared
        many = text_bytes * slowness >= WORTH_BYTES
        self.processes = (cores() if many else 1) if processes is None else processes
        self.progress = BuildProgress(label, unit, text_bytes, self.processes)
        self._stopped = threading.Event()
        self._context = _Processes()
        self._pool: ProcessPoolExecutor | None = None
        if self.processes > 1:
            self._pool = ProcessPoolExecutor(self.processes, self._context, _begin, (shared,))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop()
        elif self._pool is not None:
            self._pool.shutdown()
        self.progress.close()

    def _stop(self) -> None:
        """End the tasks and the processes soon, and the threads of `each` at their next item."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._context.started:
            if process.is_alive() and process.pid:
                os.kill(process.pid, STOP)

    def unless_stopped(self, items: Iterable[Task]) -> Iterator[Task]:
        """The items, until there is an error or a signal in another thread of `each`. Raises CancelledError then."""
        for item in items:
            if self._stopped.is_set():
                raise CancelledError
            yield item

    def map(self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results of function(shared, task) in order; a bounded number of tasks runs at the same time.

        Raises the error of the first task that fails.
        """
        if self._pool is None:
            yield from (function(self.shared, task) for task in self.unless_stopped(tasks))
            return
        todo = iter(tasks)
        running: deque[Future[Result]] = deque()
        try:
            for task in itertools.islice(todo, 2 * self.processes):
                running.append(self._submit(function, task))
            while running:
                if self._stopped.is_set():
                    raise CancelledError
                yield running.popleft().result()
                running += [self._submit(function, task) for task in itertools.islice(todo, 1)]
        except BrokenProcessPool as error:
            raise UserError(
                "a process that was reading the data has died: the machine may lack memory; a script that starts a run "
                'needs `if __name__ == "__main__":` around it'
            ) from error
        finally:
            for future in running:
                future.cancel()

    def _submit(self, function: Callable[[Any, Task], Result], task: Task) -> Future[Result]:
        assert self._pool is not None
        with interrupt_blocked():  # the pool starts its processes when it gets tasks
            return self._pool.submit(_run, function, task)

    def each(self, function: Callable[[Task], Result], items: Sequence[Task]) -> list[Result]:
        """Results of function(item) for several items (files of a folder), run in threads, in order. Raises the first error."""
        if len(items) == 1:
            return [function(items[0])]
        with ThreadPoolExecutor(min(AT_ONCE, len(items), max(2, self.processes))) as threads:
            futures = [threads.submit(function, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = (future for future in futures if future.done() and future.exception())
                for future in failed:
                    raise future.exception()  # type: ignore[misc]
                return [future.result() for future in futures]
            except BaseException:
                self._stop()
                threads.shutdown(wait=False, cancel_futures=True)
                raise


class BuildProgress:
    """Progress of a build: rich's bar on a terminal, one line in a notebook, else a line every ten seconds; silent for quick builds."""

    def __init__(self, label: str, unit: str, total: int, processes: int):
        self.label, self.unit, self.total, self.processes = label, unit, total, processes
        self._began = self._printed = time.monotonic()
        self._bytes = self._units = 0
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None
        self._line = notebook_line()

    def advance(self, text_bytes: int, units: int) -> None:
        """Add finished bytes of text, and the tokens or rows made from them, to the counts."""
        with self._lock:
            self._bytes += text_bytes
            self._units += units
            now = time.monotonic()
            if now - self._printed < (0.5 if sys.stderr.isatty() or self._line else PLAIN_EVERY_SECONDS):
                return
            self._printed = now
            if self._line is not None:
                self._line.show(f"{self.label}  {self._numbers(now)}")
            elif sys.stderr.isatty():
                self._show_bar(now)
            else:
                print(f"{self.label}  {self._numbers(now)}", file=sys.stderr, flush=True)

    def expect(self, text_bytes: int) -> None:
        """Increase the expected total by this number of bytes."""
        with self._lock:
            self.total += text_bytes

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _numbers(self, now: float) -> str:
        seconds = now - self._began
        left = round(seconds * max(0, self.total - self._bytes) / max(1, self._bytes))
        minutes, rest = divmod(left, 60)
        part = min(1.0, self._bytes / max(1, self.total))
        rate = self._units / seconds
        return f"{part:.0%}  {self._units:,} {self.unit}  {rate:,.0f} {self.unit}/s  {minutes}:{rest:02} left"

    def _show_bar(self, now: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}")
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, numbers="")
            self._bar.start()
        self._bar.update(self._task, completed=self._bytes, numbers=self._numbers(now))


def _begin(shared: Any) -> None:
    """Initialise a worker: keep the shared value, and end when the parent ends."""
    global _shared
    _shared = shared
    signal.signal(STOP, _stop)
    end_with_parent()


def _stop(number: int, frame: FrameType | None) -> None:
    """Handler of STOP in a worker: end its task, and those that the pool cannot take back.

    The process ends with the pool: killed while it sends a result, it would leave its parent waiting for the rest.
    """
    global _stopped
    _stopped = True
    if _in_task:
        raise CancelledError


def _run(function: Callable[[Any, Any], Any], task: Any) -> Any:
    global _in_task
    if _stopped:
        raise CancelledError
    _in_task = True
    try:
        return function(_shared, task)
    finally:
        _in_task = False
