"""Jails for model-written Python: `find_jail().run(program("print(1)"))` runs a program without network, files or other processes.

A jail is made by bubblewrap where it is installed, else by Linux namespaces; both are tried with a program that tries to get out.
Where neither works nothing runs, unless the caller says that code may run without a jail. The limits are on wall-clock time, and on
CPU time, memory, files, output and number of all processes of a program together.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lm.experiment import UserError

Status = Literal["ended", "timeout", "cpu", "memory", "output", "unavailable"]
START_SECONDS = 90.0  # of a jail on a busy machine; the limit of a program begins after that
LIBRARY = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class JailLimits:
    """Limits of one program, of all of its processes together."""

    seconds: float = 10.0  # wall-clock time
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 32 << 20  # of /tmp, its only writable folder
    output_bytes: int = 1 << 20  # of stdout and of stderr
    processes: int = 8  # and threads


@dataclass(frozen=True)
class JailProgram:
    """What a jail runs: a function of `MODES` in `lm/sandbox/inside.py` with its arguments, and stdin."""

    mode: Literal["program", "calls", "tests"]
    arguments: dict[str, Any]
    stdin: str = ""


def program(code: str, stdin: str = "") -> JailProgram:
    """A Python program with stdin and stdout."""
    return JailProgram("program", {"code": code}, stdin)


class JailOutcome(NamedTuple):
    """How a program ended: `ended` by itself with an exit code (128 + n: signal n), or at a limit, which killed it."""

    status: Status
    code: int
    seconds: float
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with exit code 0."""
        return self.status == "ended" and self.code == 0


class Jail:
    """Runs programs in jails of one kind, each in a new one; callers in several threads run at the same time.

    The jails are started by a small process (`lm/sandbox/warden.py`), which ends with this one.
    """

    def __init__(self, kind: str, about: str, bubblewrap: str = ""):
        self.kind, self.about, self._bubblewrap = kind, about, bubblewrap
        self._lock = threading.Lock()
        self._warden: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        atexit.register(self.close)

    def run(
        self, what: JailProgram, limits: JailLimits | None = None, channel: socket.socket | None = None
    ) -> JailOutcome:
        """Run a program; `channel` is one end of a socket to the program of another jail, and is closed here.

        Raises:
            UserError: the jail cannot be made.
        """
        limits = limits or JailLimits()
        request = {"kind": self.kind, "bubblewrap": self._bubblewrap, "limits": asdict(limits)} | asdict(what)
        body = json.dumps(request).encode()
        with self._connect(channel) as connection:
            connection.settimeout(START_SECONDS + limits.seconds)
            try:
                connection.sendall(struct.pack("<Q", len(body)) + body)
                head = json.loads(_receive(connection, struct.unpack("<Q", _receive(connection, 8))[0]))
                stdout, stderr = (_receive(connection, size) for size in head["sizes"])
            except (OSError, EOFError) as error:
                raise UserError(f"sandbox: the process that starts jails ended ({error or 'no answer'})") from error
        found = JailOutcome(head["status"], head["code"], head["seconds"], stdout, stderr)
        if found.status == "unavailable":
            raise UserError(f"sandbox: {self.about} cannot make a jail: {_last_line(found.stderr)}")
        return found

    def close(self) -> None:
        """End the warden, and with it every jail."""
        with self._lock:
            if self._control is not None:
                self._control.close()
            if self._warden is not None:
                self._warden.wait()
            self._control = self._warden = None

    def _connect(self, channel: socket.socket | None) -> socket.socket:
        """A connection to a new supervisor."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._control is None or self._warden is None or self._warden.poll() is not None:
                self._start()
            assert self._control is not None
            passed = [theirs.fileno(), *([channel.fileno()] if channel else [])]
            socket.send_fds(self._control, [b"r"], passed)
            if channel:
                channel.close()
        return ours

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"import sys; sys.path.insert(0, {LIBRARY!r}); from lm.sandbox.warden import serve; del sys.path[0]; serve({theirs.fileno()})"
            # The virtual environment, -S and -P leave out what is installed; the same seed for the order of sets in all programs.
            self._warden = subprocess.Popen(
                [os.path.realpath(sys.executable), "-P", "-S", "-s", "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        self._control = ours


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _last_line(text: bytes) -> str:
    return (text.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1][:300]


# A program that tries to get out. It prints False for each way that is open.
PROBE = """
import calendar, os, socket  # a module that is read from a file
def refused(act):
    try:
        act()
    except OSError:
        return True
    return False
print(refused(lambda: open(PATH)), refused(socket.socket), refused(lambda: open("/x", "w")), os.getpid() < 10)
"""
ADVICE = "install bubblewrap, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)"


@functools.cache
def find_jail(unjailed: bool = False) -> Jail:
    """The jail of this machine, found once; with `unjailed` none, which only limits what programs use.

    Raises:
        UserError: this machine has no jail; says why.
    """
    if sys.platform != "linux":
        raise UserError(f"sandbox: model-written code runs on Linux only, and this is {sys.platform}")
    if unjailed:
        return Jail("none", "no sandbox (programs can read and write this machine's files)")
    reasons = []
    for kind in KINDS:
        try:
            return jail_of_kind(kind)
        except UserError as error:
            reasons.append(str(error).removeprefix("sandbox: "))
    raise UserError(f"sandbox: this machine cannot jail model-written code: {'; '.join(reasons)}. {ADVICE}")


def jail_of_kind(kind: str) -> Jail:
    """A jail of one of KINDS.

    Raises:
        UserError: this machine has none; says why.
    """
    jail = KINDS[kind]()
    problem = _problem(jail)
    if problem:
        jail.close()
        raise UserError(f"sandbox: {problem}")
    return jail


def _bubblewrap() -> Jail:
    path = shutil.which("bwrap")
    if path is None:
        raise UserError("sandbox: bubblewrap is not installed")
    try:
        version = subprocess.run([path, "--version"], capture_output=True, check=False, timeout=START_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:  # of another architecture, or it hangs
        raise UserError(f"sandbox: {path} does not run: {error}") from error
    return Jail("bubblewrap", version.decode(errors="replace").strip() or path, path)


def _namespaces() -> Jail:
    return Jail("namespaces", "Linux namespaces, seccomp and rlimits")


KINDS = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}  # the first that works is used


def _problem(jail: Jail) -> str:
    """Why a jail does not hold the probe; empty if it does."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            outcome = jail.run(program(f"PATH = {file.name!r}\n{PROBE}"))
        except UserError as error:
            return str(error).removeprefix("sandbox: ")
    if outcome.stdout.split() == [b"True"] * 4:
        return ""
    return f"{jail.about} does not hold a program ({outcome.status}: {outcome.stdout or outcome.stderr!r:.200})"
