"""A jail of Linux namespaces: a file system, network, processes and IPC of its own, made by system calls through ctypes.

The file system is an empty tmpfs with Python's standard library and the shared libraries bound to it read-only, four devices,
and a writable /tmp of limited size. There is no /proc.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from lm.sandbox import inside
from lm.sandbox.system_calls import MACHINES

MOUNTS, CGROUPS, NAMES, IPC, USERS, PROCESSES, NETWORK = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
# flags of mount(2)
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
# flags of statvfs and of mount(2), which a remount in a user namespace has to keep
KEPT_FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
DETACH = 2
PIVOT_ROOT = dict(zip(MACHINES, (155, 41), strict=True))
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
DEVICES = ("null", "random", "urandom")  # a shared mapping of /dev/zero is memory that no limit counts
FILES = 4096  # files and folders in a jail's /tmp
ROOT = "/sys"  # where the new root is built: a folder of every machine that holds nothing a program needs
SIGNALLED = 128  # exit statuses from here on are of a program that a signal ended

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache  # the warden looks once, before it forks
def python_paths() -> list[str]:
    """The paths of this machine that a Python program reads: its interpreter, standard library and shared libraries."""
    base = os.path.realpath(sys.base_prefix)
    library = os.path.dirname(os.path.realpath(os.__file__))
    own = [os.path.realpath(sys.executable), library, *glob.glob(f"{base}/lib/lib*.so*"), f"{base}/lib64"]
    paths = dict.fromkeys((*own, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store"))
    found = [path for path in paths if os.path.exists(path)]
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


@functools.cache
def hidden_paths() -> list[str]:
    """Folders within `python_paths` that stay empty in a jail: installed packages."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    folders = (f"{library}/{name}" for name in ("site-packages", "dist-packages"))
    return [folder for folder in folders if os.path.isdir(folder)]


def separate_processes() -> None:
    """In the supervisor of a jail: its next child is the first process of a new process namespace."""
    user, group = os.getuid(), os.getgid()
    if os.geteuid() == 0:
        _call("unshare", PROCESSES)
        return
    _call("unshare", USERS | PROCESSES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def run(request: Mapping[str, Any]) -> NoReturn:
    """In the first process of the new process namespace: build the jail, and run the program as a child."""
    _call("unshare", MOUNTS | NETWORK | IPC | NAMES | CGROUPS)
    _replace_root(request["limits"]["disk_bytes"])
    inside.confine(request["limits"], request["user"])
    _call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    program = os.fork()
    if program == 0:
        os._exit(inside.start(request))
    # The first process only waits, because signals without a handler do not reach it. When it ends, the kernel kills the others.
    os.closerange(0, inside.REQUEST + 1)
    while True:
        ended, status = os.wait()
        if ended == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else SIGNALLED - code)


def _replace_root(disk_bytes: int) -> None:
    """Replace the root by a read-only one that holds `python_paths`, some devices and a writable /tmp."""
    _mount("none", "/", "", PRIVATE | RECURSIVE)
    _mount("tmpfs", ROOT, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in (*python_paths(), *(f"/dev/{name}" for name in DEVICES)):
        _bind(path)
    for path in hidden_paths():
        _mount("tmpfs", f"{ROOT}{path}", "tmpfs", READ_ONLY | NO_SUID | NO_DEVICES, "size=4k")
    os.mkdir(f"{ROOT}/tmp")
    _mount("tmpfs", f"{ROOT}/tmp", "tmpfs", NO_SUID | NO_DEVICES, f"size={disk_bytes},nr_inodes={FILES},mode=1777")
    _mount("none", ROOT, "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir(ROOT)
    # The old root is put over the new one, and removed from there: pivot_root(2), "pivot_root(".", ".")".
    _call("syscall", PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", DETACH)
    os.chdir("/tmp")


def _bind(path: str) -> None:
    """Make a file or folder of this machine readable in the new root; a link stays a link, of which the target is bound too."""
    target = f"{ROOT}{path}"
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, "", BIND | RECURSIVE)
    flags = os.statvfs(target).f_flag
    kept = sum(theirs for ours, theirs in KEPT_FLAGS.items() if flags & ours)
    device = 0 if path.startswith("/dev/") else NO_DEVICES
    _mount("none", target, "", REMOUNT | BIND | READ_ONLY | NO_SUID | device | kept)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError, with the call's name, if it fails."""
    if getattr(_libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
