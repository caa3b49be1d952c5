"""Function calls with a time limit, made by a worker process that is killed and replaced if one takes too long."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

START_SECONDS = 120.0  # in which a worker has to start, on a busy machine; the limit of a call begins after that


class CallOutcome(NamedTuple):
    """Outcome of a call: its value, or the error it raised as text, or neither if it took too long."""

    value: Any = None
    error: str = ""
    timed_out: bool = False


class TimedWorker:
    """A process that calls functions, each within a limit of seconds. It starts with the first call and ends with this one.

    Functions and arguments are sent to it and so have to be importable by name.
    """

    def __init__(self, memory_bytes: int = 0, library: str = ""):
        """A worker with so much address space (0: as much as there is), which imports a library before the first call."""
        self._arguments = f"{memory_bytes}, {library!r}"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> CallOutcome:
        """function(*arguments), or what became of it after so many seconds at the most."""
        with self._lock:
            try:
                return self._call(self._ready(), (function, arguments), seconds)
            except BaseException:  # Ctrl-C, or the end of the caller's own time: the next call must not get this answer
                self._kill()
                raise

    def _call(
        self, pipe: Connection, request: tuple[Callable[..., Any], tuple[Any, ...]], seconds: float
    ) -> CallOutcome:
        try:
            pipe.send(request)
            if pipe.poll(seconds):
                return pipe.recv()
        except (EOFError, OSError):
            self._kill()
            return CallOutcome(error="the process that ran it ended (it may have run out of memory, or called exit)")
        self._kill()
        return CallOutcome(timed_out=True)

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._kill()

    def _ready(self) -> Connection:
        if self._process is None or self._process.poll() is not None or self._pipe is None:
            self._kill()
            ours, theirs = socket.socketpair()
            # A Python of its own: forked it would inherit jax's threads, and multiprocessing's would run the script again.
            begin = f"import sys; sys.path[:] = {sys.path!r}; from lm.rollout.timed import serve; serve({theirs.fileno()}, {self._arguments})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", begin], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            theirs.close()
            self._pipe = Connection(ours.detach())
            if not self._pipe.poll(START_SECONDS):
                self._kill()
                raise TimeoutError(f"a worker process did not start within {START_SECONDS:g} seconds")
            self._pipe.recv()
        return self._pipe

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


in_worker = False  # whether this process is one that is killed when a call takes too long


def serve(descriptor: int, memory_bytes: int, library: str) -> None:
    """In the worker: make the calls that come over the socket, until the other end is closed.

    Args:
        memory_bytes: of address space that the process may have; 0: as much as there is.
        library: is imported first, so that the limit of the first call is the call's own; where it is missing, a call says so.
    """
    global in_worker
    in_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if library:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    pipe = Connection(descriptor)
    pipe.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            function, arguments = pipe.recv()
            pipe.send(outcome_of(function, *arguments))


def _end_with_parent(parent: int) -> None:
    """End this process, whatever it is doing, when the one that started it has died."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def outcome_of(function: Callable[..., Any], *arguments: Any) -> CallOutcome:
    """function(*arguments) now, without a limit; whatever it raises is an outcome."""
    try:
        return CallOutcome(function(*arguments))
    except (Exception, SystemExit) as error:  # a function of the user's may raise anything
        return CallOutcome(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])


def limited(seconds: float, function: Callable[..., Any], *arguments: Any) -> CallOutcome:
    """function(*arguments) in this process, or what became of it after so many seconds (see `alarm`)."""
    try:
        with alarm(seconds):
            return outcome_of(function, *arguments)
    except TookTooLong:
        return CallOutcome(timed_out=True)


class TookTooLong(BaseException):
    """Raised where a call takes longer than its limit: no Exception, so that code which catches those does not go on."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Inside, TookTooLong is raised after so many seconds; only in the main thread, elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
