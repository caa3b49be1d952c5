"""Supervisor of the processes of one run: when one dies, it ends the others and starts all again.

It uses no threads and no polling: the kernel wakes it when a process ends, a signal arrives, or a time limit is up.
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

FINISHED, DIED, USER_ERROR, STOPPED = 0, 1, 2, 130  # exit codes; USER_ERROR: a user's error, STOPPED: by a signal
SIGNALS = {  # signals that stop the supervisor -> signal sent to the processes
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart, doubled while there is no new checkpoint
END_SECONDS = 5.0  # seconds that the others have to end by themselves, and print why, after one has died


@dataclass(frozen=True)
class WorkerProcess:
    """One process to start."""

    command: tuple[str, ...]
    environment: dict[str, str]  # added to this process's environment
    log: Path | None  # file for its output; None: it inherits this process's output


@dataclass(frozen=True)
class Limits:
    """Limits of restarts and waiting."""

    max_restarts: int  # consecutive restarts without a new checkpoint
    grace: float  # seconds between a forwarded signal and SIGKILL


def supervise(
    workers: Callable[[], Sequence[WorkerProcess]],
    newest: Callable[[], str],
    limits: Limits,
    say: Callable[[str], None],
) -> int:
    """Run the workers, restarting them, until all have finished; returns the exit code.

    Args:
        workers: returns the processes to start; called before every start.
        newest: returns a description of the newest checkpoint; if it changes, the count of restarts begins anew.
        limits: limits of restarts and waiting.
        say: prints one line.
    """
    restarts, before = 0, newest()
    with _Signals() as signals:
        while True:
            group = _Group(workers())
            try:
                asked = group.watch(signals) or group.wait_for_ends(signals)
                if asked is not None:
                    return group.stop(asked, signals, limits.grace, say)
            finally:
                group.kill()
            code = group.exit_code()
            if code == FINISHED:
                return FINISHED
            what = group.first_death()
            if code in (USER_ERROR, STOPPED):
                why = "a restart would end in the same error" if code == USER_ERROR else "it was stopped by a signal"
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
    """Context that receives SIGCHLD and SIGNALS as bytes in a pipe, so that `wait` can wait for them.

    Signals that are ignored (nohup) stay ignored.
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
        """Wait for one of SIGNALS; returns it, or None after `seconds` or, with `children`, when a process ends."""
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
    """Signal handler that does nothing: one must be set for the byte to be written to the pipe."""


class _Group:
    """The processes of one start."""

    def __init__(self, workers: Sequence[WorkerProcess]):
        self.count = len(workers)
        self.logs = [worker.log for worker in workers]
        self.processes: list[subprocess.Popen] = []
        self.deaths: list[int] = []  # indices of ended processes, in the order in which they were seen
        try:
            for worker in workers:
                self.processes.append(_start(worker))
        except BaseException:
            self.kill()
            raise

    def watch(self, signals: _Signals) -> int | None:
        """Wait until a process has died or all have finished (returns None), or a signal arrives (returns it)."""
        while True:
            if self._reap() == 0 or any(self.processes[i].returncode for i in self.deaths):
                return None
            asked = signals.wait(None)
            if asked is not None:
                return asked

    def wait_for_ends(self, signals: _Signals) -> int | None:
        """Wait up to END_SECONDS seconds for all to end (returns None); a signal ends the wait and is returned."""
        until = time.monotonic() + END_SECONDS
        while self._reap() and time.monotonic() < until:
            asked = signals.wait(until - time.monotonic())
            if asked is not None:
                return asked
        return None

    def stop(self, number: int, signals: _Signals, grace: float, say: Callable[[str], None]) -> int:
        """Forward a signal, and further ones, to all processes; wait until they end, and kill them after `grace` seconds."""
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
        return self.exit_code() if self.exit_code() in (FINISHED, USER_ERROR) else STOPPED

    def exit_code(self) -> int:
        """The exit code of the group: a user's error in one process explains the ends of the others."""
        codes = {process.returncode for process in self.processes}
        if codes == {0}:
            return FINISHED
        return USER_ERROR if USER_ERROR in codes else STOPPED if codes <= {FINISHED, STOPPED} else DIED

    def first_death(self) -> str:
        """Description of the first process that failed: how it ended, and where its output is."""
        bad = [i for i in self.deaths if self.processes[i].returncode]
        told = [i for i in bad if self.processes[i].returncode == USER_ERROR]
        index = (told or bad)[0]
        process, log = self.processes[index], self.logs[index]
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        where = f" (its output: {log})" if log else ""
        return f"process {index} of {self.count} {how}{where}"

    def kill(self) -> None:
        """Kill the remaining processes and their children."""
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
        """Record the processes that have ended; returns the number still running."""
        running = 0
        for index, process in enumerate(self.processes):
            if process.poll() is None:
                running += 1
            elif index not in self.deaths:
                self.deaths.append(index)
        return running


def _start(worker: WorkerProcess) -> subprocess.Popen:
    """Start a process in its own session, so that Ctrl-C reaches it only once, forwarded by the supervisor.

    Raises:
        FileNotFoundError: there is no such program.
    """
    if shutil.which(worker.command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), worker.command[0])
    with _output(worker.log) as output:
        return subprocess.Popen(
            with_parent(worker.command),  # ends with a killed supervisor, so that the run folder's lock is released
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
