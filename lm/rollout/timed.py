"""Function calls with a time limit, made by a worker process that is killed and replaced if one takes too long."""

from __future__ import annotations

import contextlib
import importlib
import math
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

START_SECONDS = 120.0  # time limit for a worker to start on a busy machine; the limit of a call begins after that


class CallOutcome(NamedTuple):
    """Outcome of a call: its value, or the error it raised as text, or neither if it took too long."""

    value: Any = None
    error: str = ""
    timed_out: bool = False

    def problem(self, seconds: float) -> str:
        """That the call raised or took longer than its `seconds`; empty if it gave a value."""
        return f"raised {self.error}" if self.error else f"took longer than {seconds:g} s" if self.timed_out else ""


class TimedWorker:
    """A process that calls functions, each within a time limit. It starts with the first call and ends with this process.

    Functions and arguments are pickled, so they must be importable by name.
    """

    def __init__(self, memory_bytes: int = 0, library: str = ""):
        """A worker with `memory_bytes` of address space (0: no limit) that imports a library before the first call.

        Args:
            library: MODULE, or MODULE:FUNCTION to call that function too, since libraries may import more at their first use.
        """
        self._arguments = f"{memory_bytes}, {library!r}"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> CallOutcome:
        """The outcome of function(*arguments) after at most `seconds`."""
        with self._lock:
            try:
                return self._call(self._ready(), (function, arguments), seconds)
            except BaseException:  # Ctrl-C, or the caller's own time limit: the next call must not receive this result
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
            # A new Python process: a fork would inherit jax's threads, and multiprocessing's spawn would run the script again.
            begin = f"import sys; sys.path[:] = {sys.path!r}; from lm.rollout.timed import serve; serve({theirs.fileno()}, {self._arguments})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", begin],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that it has started
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


in_worker = False  # whether this process is one that is killed when a call takes too long


def serve(descriptor: int, memory_bytes: int, library: str) -> None:
    """In the worker: serve calls from the socket until the other end is closed.

    Args:
        memory_bytes: limit on the address space of the process; 0: no limit.
        library: imported (and MODULE:FUNCTION called) first, so that this does not count in the first call; if it is missing,
            the call reports that.
    """
    global in_worker
    in_worker = True
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if library:
        with contextlib.suppress(ImportError):
            module, _, function = library.partition(":")
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
    pipe = Connection(descriptor)
    pipe.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            function, arguments = pipe.recv()
            pipe.send(whole_outcome_of(function, *arguments))


def _end_with_parent(parent: int) -> None:
    """End this process at once when its parent has died."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def outcome_of(function: Callable[..., Any], *arguments: Any) -> CallOutcome:
    """The outcome of function(*arguments), called here without a limit; exceptions become outcomes."""
    try:
        return CallOutcome(function(*arguments))
    except (KeyboardInterrupt, TookTooLong):
        raise
    except BaseException as error:  # a user's function may raise anything, a panic of a Rust library too
        return CallOutcome(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])


def whole_outcome_of(function: Callable[..., Any], *arguments: Any) -> CallOutcome:
    """The outcome of a function that keeps its time limit itself, and raises TookTooLong at it."""
    try:
        return outcome_of(function, *arguments)
    except TookTooLong:
        return CallOutcome(timed_out=True)


def limited(seconds: float, function: Callable[..., Any], *arguments: Any) -> CallOutcome:
    """The outcome of function(*arguments), called in this process with a time limit (see `alarm`).

    A function that catches TookTooLong with a bare `except` and returns has taken too long all the same.
    """
    try:
        with alarm(seconds) as rang:
            outcome = outcome_of(function, *arguments)
    except TookTooLong:
        return CallOutcome(timed_out=True)
    return CallOutcome(timed_out=True) if rang.is_set() else outcome


class TookTooLong(BaseException):
    """Raised when a call exceeds its time limit; not an `Exception`, so that the called code does not catch it."""


_call = threading.local()  # `deadline`: of the call that a thread is making


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Context of a call with a time limit that the called code keeps itself, by `seconds_left`."""
    before, _call.deadline = getattr(_call, "deadline", math.inf), time.monotonic() + seconds
    try:
        yield
    finally:
        _call.deadline = before


def seconds_left() -> float:
    """Seconds that are left of the call that this thread is making; infinite without a limit."""
    return getattr(_call, "deadline", math.inf) - time.monotonic()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[threading.Event]:
    """Context that raises TookTooLong after `seconds` and sets the event; only in the main thread, elsewhere there is no limit."""
    rang = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield rang
        return

    def stop(*_: object) -> None:
        rang.set()
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
