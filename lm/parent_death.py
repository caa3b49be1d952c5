"""Processes that end when the one that started them does, however it ends: `with_parent(command)` is the command to start.

A process that is killed can end nothing itself. On Linux the kernel does it: a process asks for a signal at its parent's
death (prctl, PR_SET_PDEATHSIG), which a program that it then becomes keeps. This file, run as a program of its own, asks and
becomes the command. The kernel
watches the thread that starts it, so this is for processes that the main thread starts. Forking this process to ask in the child would take jax's threads along, which it warns of.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
NOT_FOUND = 127  # as a shell ends with it


def with_parent(command: Sequence[str]) -> list[str]:
    """The command that starts this one so that it is killed when this process, by whatever, has ended.

    Where there is no such call, on anything but Linux, the command as it is.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _main(parent: int, command: list[str]) -> int:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0):
        print(f"lm: {os.strerror(ctypes.get_errno())}: cannot end with process {parent}", file=sys.stderr)
    if os.getppid() != parent:  # it has ended before its death could be asked for
        return -signal.SIGKILL & 0xFF
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"lm: {command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2:]))
