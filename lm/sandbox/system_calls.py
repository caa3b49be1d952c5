"""The system-call filter of jailed programs, as a BPF program for seccomp; stdlib only, since it is also loaded inside jails.

A denied call fails with EPERM, so that a Python program sees PermissionError. The filter is a second wall: namespaces already
hide files, network and other processes, and a jailed process has no capabilities.
"""

from __future__ import annotations

import ctypes
import os
import struct

NUMBERS: dict[str, tuple[int, int]] = {  # name: number on x86-64 and on aarch64; -1: no such call
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "perf_event_open": (298, 241),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "quotactl": (179, 60), "quotactl_fd": (443, 443), "fanotify_init": (300, 262),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
    # large or privileged parts of the kernel
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "syslog": (103, 116), "personality": (135, 92), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "vhangup": (153, 58), "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "uselib": (134, -1),
}  # fmt: skip
SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
CLONE, CLONE3 = (56, 220), (435, 435)
MMAP = (9, 222)
MACHINES = {
    "x86_64": 0xC000003E,
    "aarch64": 0xC00000B7,
}  # AUDIT_ARCH of <linux/audit.h>; the order of the numbers above

NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET
SHARED, ANONYMOUS = 0x01, 0x20  # MAP_SHARED (also of MAP_SHARED_VALIDATE) and MAP_ANONYMOUS
X32 = 0x40000000  # bit of system calls of the x32 ABI, which has other numbers
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, FOURTH_ARGUMENT = 0, 4, 16, 40  # offsets in struct seccomp_data
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000  # FAIL | errno
EPERM, ENOSYS, EACCES = 1, 38, 13

SET_NO_NEW_PRIVS, SET_SECCOMP, FILTER_MODE = 38, 22, 2  # of <linux/prctl.h>


def filter_program(machine: str) -> bytes:
    """The BPF program for a machine, a key of MACHINES; an array of struct sock_filter."""
    column = list(MACHINES).index(machine)
    code = [(LOAD, 0, 0, ARCHITECTURE), (JUMP_EQUAL, 1, 0, MACHINES[machine]), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, NUMBER), (JUMP_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for numbers in NUMBERS.values():
        if numbers[column] >= 0:
            code += [(JUMP_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, FAIL | EPERM)]
    # The C library falls back to clone, whose flags can be read here; those of clone3 are behind a pointer.
    code += [(JUMP_EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, FAIL | ENOSYS)]
    # Sockets within the jail (asyncio, multiprocessing) are allowed, other address families are not.
    for numbers in SOCKETS.values():
        code += [(JUMP_EQUAL, 0, 4, numbers[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
        code += [(JUMP_EQUAL, 1, 0, 1), (RETURN, 0, 0, FAIL | EACCES), (RETURN, 0, 0, ALLOW)]
    code += [(JUMP_EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    code += [(JUMP_IF_SET, 0, 1, NEW_NAMESPACES), (RETURN, 0, 0, FAIL | EPERM), (RETURN, 0, 0, ALLOW)]
    # Shared memory without a file is counted by no limit, and its pages stay when a process gives back its part.
    code += [(JUMP_EQUAL, 0, 3, MMAP[column]), (LOAD, 0, 0, FOURTH_ARGUMENT)]
    code += [(JUMP_IF_SET, 0, 1, SHARED), (JUMP_IF_SET, 1, 0, ANONYMOUS)]
    code += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | EPERM)]
    return b"".join(struct.pack("<HBBI", operation, yes, no, value) for operation, yes, no, value in code)


class _Program(ctypes.Structure):
    """Struct sock_fprog: number of instructions and their address."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def install_filter() -> None:
    """Apply the filter to this process and all of its later children, which cannot remove it.

    Raises:
        OSError: the kernel has no seccomp, or the machine is none of MACHINES.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no system-call filter for {machine}; there are {', '.join(MACHINES)}")
    code = filter_program(machine)
    library = ctypes.CDLL(None, use_errno=True)
    kept = ctypes.create_string_buffer(code)
    program = _Program(len(code) // 8, ctypes.addressof(kept))
    for arguments in ((SET_NO_NEW_PRIVS, 1, 0, 0, 0), (SET_SECCOMP, FILTER_MODE, ctypes.byref(program), 0, 0)):
        if library.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
