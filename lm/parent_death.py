"""Child processes that end with their parent, even if it is killed: `with_parent(command)` is the command to start.

A killed process cannot end its children itself. On Linux the kernel does: a process can request a signal at its parent's
death (prctl, PR_SET_PDEATHSIG), and the request survives exec. This file, run as a program, makes the request and then execs the
command. The kernel watches the thread that started the child, so only the main thread may start such a child. The request is
not made in a fork of this process, because forking copies jax's threads, of which jax warns.

A child of multiprocessing calls `end_with_parent()`, and is started in the context `interrupt_blocked()`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
NOT_FOUND = 127  # as a shell ends with it


def with_parent(command: Sequence[str]) -> list[str]:
    """The command line that starts `command` so that it is killed when this process ends for any reason.

    On systems other than Linux, which lack the call, the command itself.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_with_parent() -> None:
    """End this process, a child of multiprocessing, as soon as its parent has ended."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def interrupt_blocked() -> Iterator[None]:
    """Context in which multiprocessing starts children that have SIGINT blocked from their first instruction on.

    Ctrl-C in a terminal goes to all processes of the group, and would end one that is still importing with a traceback.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT in this thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _main(parent: int, command: list[str]) -> int:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0):
        print(f"lm: {os.strerror(ctypes.get_errno())}: cannot end with process {parent}", file=sys.stderr)
    if os.getppid() != parent:  # the parent ended before the request was made
        return -signal.SIGKILL & 0xFF
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"lm: {command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2:]))
