"""Keeps the processes of one run going: when one dies the others are ended, and all start again together.

There are no threads and no polling: the kernel wakes it for the end of a process, for a signal, and for time that is up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lm.parent_death import with_parent

FINISHED, DIED, POINTLESS, STOPPED = 0, 1, 2, 130  # exit codes; the last two are those of `lm run` too
SIGNALS = {  # what asks to stop, and what the processes get for it
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart: doubled while nothing is gained
LAST_WORDS = 5.0  # seconds that the others have to end by themselves, and say why, when one has died


@dataclass(frozen=True)
class WorkerProcess:
    """One process to be started."""

    command: tuple[str, ...]
    environment: dict[str, str]  # added to that of this process
    log: Path | None  # where its output goes; None: where this process's goes


@dataclass(frozen=True)
class Limits:
    """When to give up, and how long to wait."""

    max_restarts: int  # in a row without a new checkpoint
    grace: float  # seconds from a signal that is passed on to SIGKILL


def supervise(
    workers: Callable[[], Sequence[WorkerProcess]],
    newest: Callable[[], str],
    limits: Limits,
    say: Callable[[str], None],
) -> int:
    """Run the workers until all have finished; returns the exit code.

    Args:
        workers: what to start, asked for before every start.
        newest: the newest checkpoint in words; a restart after which it is another one has gained something.
        say: takes one line for people.
    """
    restarts, before = 0, newest()
    with _Signals() as signals:
        while True:
            group = _Group(workers())
            try:
                asked = group.watch(signals) or group.last_words(signals)
                if asked is not None:
                    return group.stop(asked, signals, limits.grace, say)
            finally:
                group.kill()
            code = group.verdict()
            if code == FINISHED:
                return FINISHED
            what = group.first_death()
            if code in (POINTLESS, STOPPED):
                why = "a restart would end in the same error" if code == POINTLESS else "stopped by a signal to it"
                say(f"{what}: {why}")
                return code
            now = newest()
            restarts, before = (restarts + 1 if now == before else 1), now
            if restarts > limits.max_restarts:
                say(f"{what}: given up after {limits.max_restarts} restarts without a new checkpoint ({now})")
                return DIED
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (restarts - 1))
            count = f"restart {restarts} of {limits.max_restarts} without a new checkpoint"
            say(f"{what}: {count}, from {now}, in {pause:.0f} s")
            if signals.wait(pause, children=False) is not None:
                say("stopped while no process was running")
                return STOPPED


class _Signals:
    """Waiting for SIGCHLD and for SIGNALS, which inside arrive as bytes in a pipe and nowhere else.

    What is ignored stays so (nohup).
    """

    def __enter__(self) -> _Signals:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        heard = [number for number in (*SIGNALS, signal.SIGCHLD) if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, _ignore) for number in heard}
        self.wakeup = signal.set_wakeup_fd(self.writer)
        self.unread: list[int] = []
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.reader)
        os.close(self.writer)

    def wait(self, seconds: float | None, children: bool = True) -> int | None:
        """The one of SIGNALS that comes within that time; None when it is over.

        With `children` it is over as soon as a process ends, too.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            asked = next((number for number in self.unread if number in SIGNALS), None)
            if asked is not None:
                self.unread.remove(asked)
                return asked
            if children and self.unread:
                self.unread.clear()
                return None
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return None
            if select.select([self.reader], [], [], left)[0]:
                self.unread += os.read(self.reader, 4096)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the byte to be written; new programs do not inherit it."""


class _Group:
    """The processes of one start."""

    def __init__(self, workers: Sequence[WorkerProcess]):
        self.count = len(workers)
        self.logs = [worker.log for worker in workers]
        self.processes: list[subprocess.Popen] = []
        self.deaths: list[int] = []  # indices, in the order in which they were seen
        try:
            for worker in workers:
                self.processes.append(_start(worker))
        except BaseException:
            self.kill()
            raise

    def watch(self, signals: _Signals) -> int | None:
        """Until one has died or all have finished (None), or a signal came, which it returns."""
        while True:
            if self._reap() == 0 or any(self.processes[i].returncode for i in self.deaths):
                return None
            asked = signals.wait(None)
            if asked is not None:
                return asked

    def last_words(self, signals: _Signals) -> int | None:
        """Until all have ended, for a short time (None), or a signal came, which it returns."""
        until = time.monotonic() + LAST_WORDS
        while self._reap() and time.monotonic() < until:
            asked = signals.wait(until - time.monotonic())
            if asked is not None:
                return asked
        return None

    def stop(self, number: int, signals: _Signals, grace: float, say: Callable[[str], None]) -> int:
        """Pass a signal on to all, and those that come after it; wait until they have saved, or the time is up."""
        until = time.monotonic() + grace
        asked: int | None = number
        while self._reap():
            if asked is not None:
                say(f"{signal.Signals(asked).name}: stopping, with {grace:.0f} s to save")
                self._signal(SIGNALS[signal.Signals(asked)])
            if time.monotonic() >= until:
                say(f"still running after {grace:.0f} s: killed")
                self.kill()
                break
            asked = signals.wait(until - time.monotonic())
        return self.verdict() if self.verdict() in (FINISHED, POINTLESS) else STOPPED

    def verdict(self) -> int:
        """What the ends of all mean together: an error of the user's in any of them explains the others."""
        codes = {process.returncode for process in self.processes}
        if codes == {0}:
            return FINISHED
        return POINTLESS if POINTLESS in codes else STOPPED if codes <= {FINISHED, STOPPED} else DIED

    def first_death(self) -> str:
        """Which process ended badly first, how, and where its output is."""
        bad = [i for i in self.deaths if self.processes[i].returncode]
        told = [i for i in bad if self.processes[i].returncode == POINTLESS]
        index = (told or bad)[0]
        process, log = self.processes[index], self.logs[index]
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        where = f" (its output: {log})" if log else ""
        return f"process {index} of {self.count} {how}{where}"

    def kill(self) -> None:
        """End what is left, with all that it has started."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                    else:
                        process.send_signal(number)

    def _reap(self) -> int:
        """Note those that have ended; how many are still running."""
        running = 0
        for index, process in enumerate(self.processes):
            if process.poll() is None:
                running += 1
            elif index not in self.deaths:
                self.deaths.append(index)
        return running


def _start(worker: WorkerProcess) -> subprocess.Popen:
    """A process in a session of its own: Ctrl-C reaches it through this one only, once, and not twice.

    Raises:
        FileNotFoundError: there is no such program.
    """
    if shutil.which(worker.command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), worker.command[0])
    with _output(worker.log) as output:
        return subprocess.Popen(
            with_parent(worker.command),  # a supervisor that is killed leaves nobody behind who holds the run's folder
            env=os.environ | worker.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[int | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        stream.write(f"--- started {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
        stream.flush()
        yield stream.fileno()
