"""The process that starts jails: it receives a connection for each program, and forks a supervisor for it.

It is a small Python process of its own, because a fork of the trainer would copy jax's threads, and because a fork of a warm
interpreter starts a program in milliseconds. Stdlib only. It never reads a program: the supervisor does, after the fork, so that no
program can find another one in its memory. It ends when the trainer's end of the control socket is closed, and a supervisor kills its jail
when the trainer's end of the connection is.
"""

from __future__ import annotations

import bisect  # noqa: F401  (as math, heapq …: programs start with what is loaded here)
import collections  # noqa: F401
import contextlib
import ctypes
import fcntl
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import pathlib
import random  # noqa: F401
import re  # noqa: F401
import select
import signal
import socket
import string  # noqa: F401
import struct
import sys
import time
import traceback
import typing  # noqa: F401
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from lm.sandbox import inside, namespaces

TICK_SECONDS = 0.05  # between two measurements of memory and CPU time
START_SECONDS = 60.0  # time limit for a jail to be ready; the program's own limit begins after that
CHUNK = 1 << 16
USER_IDS = (61184, 4096)  # first and number of the user ids for jails of root: those of systemd's dynamic users
BE_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def serve(descriptor: int) -> None:
    """Fork a supervisor for each connection that comes over the control socket, until its other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    namespaces.python_paths(), namespaces.hidden_paths()
    with socket.socket(fileno=descriptor) as control:
        while True:
            _, received, _, _ = socket.recv_fds(control, 1, 2)
            if not received:
                return
            if os.fork() == 0:
                control.close()
                _supervise(received[0], received[1] if len(received) > 1 else os.open(os.devnull, os.O_RDWR))
            for number in received:
                os.close(number)


def _supervise(connection: int, channel: int) -> NoReturn:
    """Run the program of a connection and send its outcome; `channel` is a socket to another jail."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with socket.socket(fileno=connection) as trainer:
            size = struct.unpack("<Q", _read(trainer, 8))[0]
            request = json.loads(_read(trainer, size))
            try:
                outcome = Supervisor(request, trainer, channel).run()
            except OSError as error:
                outcome = {
                    "status": "unavailable",
                    "code": 1,
                    "seconds": 0.0,
                    "stdout": b"",
                    "stderr": str(error).encode(),
                }
            streams = [bytes(outcome.pop(name)) for name in ("stdout", "stderr")]
            head = json.dumps(outcome | {"sizes": [len(stream) for stream in streams]}).encode()
            trainer.sendall(struct.pack("<Q", len(head)) + head + b"".join(streams))
    except (BrokenPipeError, EOFError, ConnectionError):
        os._exit(1)  # the trainer has ended
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(CHUNK, size - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


# ---- kinds of jails ----------------------------------------------------------------------------------------------------


class JailKind(NamedTuple):
    """A kind of jail: what its supervisor does before the fork, and what the child does, which runs the program."""

    prepare: Callable[[], None]
    run: Callable[[Mapping[str, Any]], None]


def _run_bubblewrap(request: Mapping[str, Any]) -> NoReturn:
    command = [
        request["bubblewrap"],
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--setenv",
        "PYTHONHASHSEED",
        "0",
    ]
    command += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    if os.geteuid() == 0:  # so that `inside.confine` can change to a user id without rights
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    own = os.path.dirname(os.path.abspath(__file__))
    bound = [("--ro-bind", own, "/opt/lm/sandbox")]
    for path in namespaces.python_paths():
        bound.append(("--symlink", os.readlink(path), path) if os.path.islink(path) else ("--ro-bind", path, path))
    bound += [("--dev-bind", f"/dev/{name}", f"/dev/{name}") for name in namespaces.DEVICES]
    parents = {str(parent) for _, _, path in bound for parent in pathlib.PurePath(path).parents[:-1]}
    for path in sorted(parents):  # bubblewrap makes them for root alone
        command += ["--perms", "0755", "--dir", path]
    command += [part for parts in bound for part in parts]
    for path in namespaces.hidden_paths():
        command += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    command += ["--perms", "1777", "--size", str(request["limits"]["disk_bytes"]), "--tmpfs", "/tmp"]
    code = "import sys; sys.path.insert(0, '/opt'); from lm.sandbox.inside import main; del sys.path[0]; main()"
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    os.execv(command[0], [*command, "--", os.path.realpath(sys.executable), "-P", "-S", "-s", "-c", code])


def _run_namespaces(request: Mapping[str, Any]) -> None:
    os.close(inside.REQUEST)  # the request is in memory
    namespaces.run(request)


def _run_unjailed(request: Mapping[str, Any]) -> NoReturn:
    os.close(inside.REQUEST)
    inside.confine(request["limits"] | {"processes": 0}, 0)
    os._exit(inside.start(request))


def _nothing() -> None:
    """Nothing to prepare."""


KINDS = {
    "bubblewrap": JailKind(_nothing, _run_bubblewrap),
    "namespaces": JailKind(namespaces.separate_processes, _run_namespaces),
    "none": JailKind(_nothing, _run_unjailed),
}


# ---- the supervisor ----------------------------------------------------------------------------------------------------


class Supervisor:
    """Runs one program in a jail, and kills all of it at the first limit that it exceeds."""

    def __init__(self, request: dict[str, Any], trainer: socket.socket, channel: int):
        self.request, self.limits, self.trainer, self.channel = request, request["limits"], trainer, channel
        self.streams: dict[int, bytearray] = {}
        self.began: float | None = None  # when the jail was ready

    def run(self) -> dict[str, Any]:
        """The outcome: `status`, `code`, `seconds`, `stdout` and `stderr`."""
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine has no memory left, the kernel should kill this and not the trainer
        ctypes.CDLL(None).prctl(BE_SUBREAPER, 1, 0, 0, 0)
        kind = KINDS[self.request["kind"]]
        self.request["user"] = _user_without_rights()
        kind.prepare()
        ends = [os.pipe() for _ in range(3)]
        stdin = _sealed(self.request["stdin"].encode("utf-8", "replace"))
        child = os.fork()
        if child == 0:
            _run_child(kind, self.request, stdin, [end for _, end in ends], self.channel)
        for number in (stdin, self.channel, *(end for _, end in ends)):
            os.close(number)
        (out, _), (err, _), (ready, _) = ends
        self.streams = {out: bytearray(), err: bytearray()}
        for stream in self.streams:
            os.set_blocking(stream, False)
        try:
            status = self._watch(child, ready)
        finally:
            os.kill(child, signal.SIGKILL)
            _, ended, used = os.wait4(child, 0)
            code = os.waitstatus_to_exitcode(ended)
            _kill_descendants()
        seconds = time.monotonic() - self.began if self.began else 0.0
        for stream in self.streams:
            self._read(stream, self.limits["output_bytes"])
        code = code if code >= 0 else namespaces.SIGNALLED - code
        if status == "ended":
            # The kernel kills at its limit on CPU time where this process got no time to do so before.
            killed = code >= namespaces.SIGNALLED and used.ru_utime + used.ru_stime > self.limits["cpu_seconds"]
            status = "unavailable" if not self.began else "cpu" if killed else "ended"
        found = {
            name: text[: self.limits["output_bytes"]]
            for name, text in zip(("stdout", "stderr"), self.streams.values(), strict=True)
        }
        return {"status": status, "code": code, "seconds": seconds} | found

    def _watch(self, child: int, ready: int) -> str:
        """Wait for the end of the jail or its first exceeded limit. Raises EOFError if the trainer has ended."""
        poller, process = select.poll(), os.pidfd_open(child)
        for number in (*self.streams, ready, process, self.trainer.fileno()):
            poller.register(number, select.POLLIN)
        deadline, tick = time.monotonic() + START_SECONDS, 0.0
        while (now := time.monotonic()) < deadline:
            for number, _ in poller.poll(1 + 1000 * min(TICK_SECONDS, deadline - now)):
                if number == process:
                    return "ended"
                if number == self.trainer.fileno():
                    raise EOFError
                if number == ready:
                    poller.unregister(ready)
                    if os.read(ready, 1):
                        self.began = time.monotonic()
                        deadline = self.began + self.limits["seconds"]
                elif not self._read(number, CHUNK):
                    poller.unregister(number)
            if max(map(len, self.streams.values())) > self.limits["output_bytes"]:
                return "output"
            if self.began and now >= tick:
                tick = now + TICK_SECONDS
                memory, seconds = _usage(child)
                if memory > self.limits["memory_bytes"]:
                    return "memory"
                if seconds > self.limits["cpu_seconds"]:
                    return "cpu"
        return "timeout" if self.began else "unavailable"

    def _read(self, stream: int, most: int) -> bool:
        """Read what a stream holds now, about `most` bytes; False at its end."""
        try:
            while most > 0:
                part = os.read(stream, CHUNK)
                self.streams[stream] += part
                most -= len(part)
                if not part:
                    return False
        except BlockingIOError:
            pass
        return True


def _run_child(kind: JailKind, request: Mapping[str, Any], stdin: int, ends: list[int], channel: int) -> NoReturn:
    """In the child: put the open files in their places, close the others, and run the program."""
    try:
        os.setsid()
        numbers = (stdin, ends[0], ends[1], channel, ends[2], _sealed(json.dumps(request).encode()))
        high = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in numbers]  # none is overwritten below
        for place, number in enumerate(high):
            os.dup2(number, place)
        os.closerange(inside.REQUEST + 1, 1 << 16)
        kind.run(request)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def _sealed(content: bytes) -> int:
    """A file in memory that nobody can change."""
    number = os.memfd_create("content", os.MFD_ALLOW_SEALING)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    fcntl.fcntl(
        number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    return number


def _user_without_rights() -> int:
    """For root, a user id for this jail alone, so that its processes are counted apart from others; else 0."""
    user = USER_IDS[0] + os.getpid() % USER_IDS[1]
    with open("/proc/self/uid_map") as file:
        ranges = [list(map(int, line.split())) for line in file]
    return user if os.geteuid() == 0 and any(first <= user < first + count for first, _, count in ranges) else 0


def _usage(process: int) -> tuple[int, float]:
    """Memory in bytes (without shared pages) and CPU seconds of a process and its descendants."""
    memory, ticks, waiting = 0, 0, [process]
    while waiting:
        one = waiting.pop()
        try:
            times = _proc(one, "stat").rpartition(")")[2].split()[11:15]
            _, resident, shared, *_ = map(int, _proc(one, "statm").split())
            waiting += _children(one)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        memory += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
        ticks += sum(map(int, times))
    return memory, ticks / os.sysconf("SC_CLK_TCK")


def _children(process: int) -> list[int]:
    threads = os.listdir(f"/proc/{process}/task")
    return [int(one) for thread in threads for one in _proc(process, f"task/{thread}/children").split()]


def _proc(process: int, name: str) -> str:
    with open(f"/proc/{process}/{name}") as file:
        return file.read()


def _kill_descendants() -> None:
    """Kill the processes that a program left behind; those of a killed process become children of this one."""
    while children := _children(os.getpid()):
        for child in children:
            os.kill(child, signal.SIGKILL)
        while children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(children.pop(), 0)
