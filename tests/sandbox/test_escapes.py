"""Programs that try to leave their jail, or to use up the machine: all are caught, in every kind of jail that works here."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.experiment import UserError
from lm.sandbox.jail import Jail, JailLimits, JailOutcome, jail_of_kind, program

LIMITS = JailLimits(seconds=60.0, cpu_seconds=3.0, memory_bytes=128 << 20, disk_bytes=4 << 20, output_bytes=100_000)
TRY = """
import ctypes, mmap, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(act):
    try:
        print("open", act())
    except (OSError, EOFError) as error:
        print("refused", type(error).__name__)
def call(*arguments):
    if libc.syscall(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "no")
"""


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def jail(request) -> Jail:
    try:
        found = jail_of_kind(request.param)
    except UserError as error:
        pytest.skip(str(error))
    yield found
    found.close()


def lines(jail: Jail, code: str) -> list[str]:
    outcome = jail.run(program(TRY + code), LIMITS)
    assert outcome.ok, outcome
    return outcome.stdout.decode().splitlines()


def within(seconds: float, run: Callable[[], JailOutcome]) -> JailOutcome:
    """The first of five outcomes that took so long at most; a busy machine may be late once, and not every time."""
    for _ in range(5):
        if (outcome := run()).seconds < seconds:
            return outcome
    pytest.fail(f"{outcome.seconds:g} seconds instead of {seconds:g} at most")


def running(name: str) -> list[int]:
    """Processes of this machine with that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [int(path.parent.name)] if path.read_text().strip() == name else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_fork_bomb_is_bounded_and_killed_whole(jail):
    name = f"bomb{os.getpid()}"
    code = f"""
libc.prctl(15, b"{name}", 0, 0, 0)
count = 0
while True:
    try:
        if os.fork() == 0:
            while True:
                time.sleep(1)
        count += 1
    except BlockingIOError:
        break
print(count, flush=True)
while True:
    time.sleep(1)
"""
    outcome = jail.run(program(TRY + code), JailLimits(seconds=3.0, processes=8))
    assert outcome.status == "timeout"
    assert 0 < int(outcome.stdout) <= 8 + 3
    assert running(name) == []


def test_a_bomb_of_threads_is_bounded(jail):
    code = """
import threading
count = 0
try:
    for count in range(1000):
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
except RuntimeError:
    pass
print(count)
"""
    assert int(lines(jail, code)[0]) <= 8 + 3


def test_a_fork_bomb_that_never_stops_forking_ends_at_its_limit(jail):
    name, began = f"fork{os.getpid()}", time.monotonic()
    code = f"""
libc.prctl(15, b"{name}", 0, 0, 0)
while True:
    try:
        os.fork()
    except BlockingIOError:
        pass
"""
    outcome = within(3, lambda: jail.run(program(TRY + code), JailLimits(seconds=2.0, cpu_seconds=1.0)))
    assert outcome.status in ("cpu", "timeout")
    assert running(name) == []
    assert time.monotonic() - began < 60


def test_the_memory_of_one_process_is_bounded(jail):
    outcome = jail.run(program("x = bytearray(1 << 30)"), LIMITS)
    assert outcome.status == "ended"
    assert outcome.stderr.endswith(b"MemoryError\n")


def test_the_memory_of_all_processes_together_is_bounded(jail):
    code = "import os\nfor _ in range(6):\n    if os.fork() == 0: break\nx = bytearray(b'x') * (60 << 20)\nimport time; time.sleep(60)"
    assert jail.run(program(code), LIMITS).status == "memory"


@pytest.mark.parametrize(
    "call",
    [
        "os.memfd_create('x')",
        "call(29, 0, 1 << 30, 0o1600)",
        "os.mkdir('/dev/shm/x')",
        "mmap.mmap(-1, 1 << 20)",
        "open('/dev/zero')",
    ],
)
def test_memory_that_no_limit_counts_cannot_be_had(jail, call):
    if "29" in call and os.uname().machine != "x86_64":
        pytest.skip("the number of shmget is that of x86-64")
    assert lines(jail, f"attempt(lambda: {call})")[0].startswith("refused")


def test_the_disk_is_bounded_in_bytes_and_only_tmp_is_writable(jail):
    code = """
def fill():
    for number in range(100):
        with open(f"/tmp/{number}", "wb") as file:
            file.write(bytes(1 << 20))
attempt(fill)
for path in ("/", "/usr/lib", "/dev", os.path.dirname(os.__file__)):
    attempt(lambda: open(path + "/x", "w"))
attempt(lambda: os.truncate("/tmp/big", open("/tmp/big", "w").write("") or 1 << 40))
"""
    assert [line.split()[0] for line in lines(jail, code)] == ["refused"] * 6


def test_memory_of_a_process_and_of_files_can_be_mapped(jail):
    code = """
with open("/tmp/x", "w+b") as file:
    file.truncate(4096)
    mmap.mmap(file.fileno(), 4096)[:2] = b"ab"
print(open("/tmp/x").read(2), len(mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
"""
    assert lines(jail, code) == ["ab 4096"]


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("call(101, 16, child, 0, 0)", True),  # ptrace of a child
        ("call(248, b'user', b'x', b'y', 1, -3)", True),  # add_key
        ("call(323, 0)", True),  # userfaultfd
        ("call(425, 4, ctypes.create_string_buffer(200))", True),  # io_uring_setup
        ("time.clock_settime(time.CLOCK_REALTIME, 0)", True),
        ("resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", True),
        ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", True),
        ("os.truncate(os.open('/tmp/s', os.O_CREAT | os.O_RDWR), 1 << 40)", True),
        ("[open(f'/tmp/{n}', 'w').close() for n in range(10**6)]", True),
        ("open('/dev/stdout', 'w')", True),
        ("sorted([1])", False),
    ],
)
def test_other_ways_out_are_closed(jail, code, refused):
    if "call(" in code and os.uname().machine != "x86_64":
        pytest.skip("the numbers of system calls are those of x86-64")
    program = f"""
import resource
child = os.fork()
if child == 0:
    time.sleep(60)
try:
    attempt(lambda: {code})
except ValueError as error:  # of setrlimit
    print("refused", error)
os.kill(child, 9)
"""
    assert lines(jail, program)[0].startswith("refused") == refused


def test_system_calls_of_another_abi_end_the_program(jail):
    if os.uname().machine != "x86_64":
        pytest.skip("only x86-64 has the ABI x32")
    outcome = jail.run(program(TRY + "libc.syscall(0x40000000 + 39)"), LIMITS)
    assert outcome.code == 128 + 31  # SIGSYS


def test_nothing_of_one_program_is_left_for_the_next(jail):
    lines(jail, "open('/tmp/note', 'w').write('x'); open('/tmp/.hidden', 'w')")
    assert lines(jail, "print(os.listdir('/tmp'))") == ["[]"]


def test_there_is_no_network(jail):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(name := f"\0lm-{os.getpid()}")
        local.listen()
        code = f"""
attempt(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1))
attempt(lambda: socket.create_connection(("8.8.8.8", 53), 1))
attempt(lambda: socket.getaddrinfo("localhost", 80))
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)))
attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
attempt(lambda: socket.socket(socket.AF_UNIX).connect({name!r}))
"""
        assert [line.split()[0] for line in lines(jail, code)] == ["refused"] * 8


def test_files_of_this_machine_cannot_be_seen(jail, tmp_path):
    (tmp_path / "secret").write_text("x")
    os.chmod(tmp_path, 0o755)
    places = [
        str(tmp_path / "secret"),
        __file__,
        "/etc/passwd",
        "/etc/shadow",
        "/root/.bashrc",
        "/home",
        "/var",
        "/sys",
        "/boot",
    ]
    code = f"for path in {places}:\n    attempt(lambda: os.stat(path))"
    assert lines(jail, code) == ["refused FileNotFoundError"] * len(places)


def test_links_lead_nowhere_outside(jail, tmp_path):
    (tmp_path / "secret").write_text("x")
    code = f"""
os.chdir("/tmp")
os.symlink({str(tmp_path / "secret")!r}, "one")
os.symlink("../../../../../../etc/shadow", "two")
os.symlink("/proc/self/root", "three")
for name in ("one", "two", "three/etc/passwd", "/../../etc/passwd", "/tmp/../../../etc/passwd"):
    attempt(lambda: open(name))
attempt(lambda: os.link(os.__file__, "hard"))
attempt(lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)))
attempt(lambda: os.chroot("/tmp"))
"""
    assert [line.split()[0] for line in lines(jail, code)] == ["refused"] * 8


def test_there_is_no_proc_and_it_cannot_be_mounted(jail):
    code = """
attempt(lambda: os.listdir("/proc"))
attempt(lambda: open("/proc/self/environ"))
os.mkdir("/tmp/proc")
if libc.mount(b"proc", b"/tmp/proc", b"proc", 0, b"") == 0: print("open")
if libc.mount(b"none", b"/tmp/proc", b"tmpfs", 0, b"") == 0: print("open")
if libc.unshare(0x10000000) == 0: print("open")
if libc.ptrace(16, 1, 0, 0) == 0: print("open")
"""
    assert [line.split()[0] for line in lines(jail, code)] == ["refused"] * 2


def test_signals_reach_no_process_outside(jail):
    code = f"""
import signal
attempt(lambda: os.kill({os.getpid()}, signal.SIGKILL))
attempt(lambda: os.kill(os.getpid() + 1000, signal.SIGKILL))
try:
    os.kill(1, signal.SIGKILL)
except PermissionError:
    pass
time.sleep(0.2)
print("alive", os.getppid() in (0, 1))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child == 0:
    time.sleep(60)
os.kill(-1, signal.SIGKILL)
print(os.waitpid(child, 0)[1])
"""
    found = lines(jail, code)
    assert [line.split()[0] for line in found] == ["refused", "refused", "alive", "9"]
    assert jail.run(program("print(1)"), LIMITS).ok


def test_a_program_that_ignores_signals_is_killed_at_its_limit(jail):
    code = "import signal\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\nimport time; time.sleep(60)"
    outcome = within(1.5, lambda: jail.run(program(code), JailLimits(seconds=0.5)))
    assert outcome.status == "timeout"


def test_an_infinite_loop_costs_its_limit_and_at_most_a_second(jail):
    outcome = within(2.0, lambda: jail.run(program("while True: pass"), JailLimits(seconds=1.0)))
    assert outcome.status in ("timeout", "cpu")


def test_the_time_of_the_processors_is_bounded(jail):
    code = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
    outcome = jail.run(program(code), JailLimits(seconds=30.0, cpu_seconds=1.0))
    assert outcome.status == "cpu"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_is_cut_and_stopped(jail, stream):
    outcome = jail.run(program(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)"), LIMITS)
    assert outcome.status == "output"
    assert len(getattr(outcome, stream)) == LIMITS.output_bytes


def test_a_process_left_in_the_background_ends_with_its_program(jail):
    name = f"left{os.getpid()}"
    code = f"""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        libc.prctl(15, b"{name}", 0, 0, 0)
        time.sleep(60)
    os._exit(0)
time.sleep(0.3)
"""
    assert lines(jail, code) == []
    assert running(name) == []


def test_no_open_file_and_no_variable_of_this_process_is_inherited(jail, monkeypatch):
    monkeypatch.setenv("LM_SECRET", "x")
    code = """
import stat
for number in range(3, 64):
    try:
        print(number, stat.S_ISCHR(os.fstat(number).st_mode))
    except OSError:
        pass
print(sorted(os.environ))
"""
    assert lines(jail, code) == ["3 True", "['HOME', 'LANG', 'PATH']"]  # 3: /dev/null where there is no other jail


def test_no_rights_are_left_and_none_can_be_gained(jail):
    code = """
attempt(lambda: os.setuid(0))
attempt(lambda: os.setgroups([0]))
attempt(lambda: os.nice(-5))
print(os.getuid() != 0)
"""
    assert lines(jail, code)[:3] == ["refused PermissionError"] * 3


def test_bytes_that_are_no_text_are_handed_on(jail):
    assert jail.run(program("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')"), LIMITS).stdout == b"\xff\xfe"


def test_a_crash_of_the_interpreter_is_an_exit_code(jail):
    outcome = jail.run(program("import ctypes; ctypes.string_at(0)"), LIMITS)
    assert (outcome.status, outcome.code) == ("ended", 128 + 11)


def test_the_same_program_gives_the_same_output(jail):
    code = "import random; print(random.random(), list({str(n) for n in range(50)}))"
    assert jail.run(program(code), LIMITS).stdout == jail.run(program(code), LIMITS).stdout


def test_a_program_reads_stdin_and_its_exit_code_is_given(jail):
    outcome = jail.run(
        program("import sys; print(sum(map(int, sys.stdin.read().split()))); sys.exit(3)", "1 2\n3"), LIMITS
    )
    assert (outcome.stdout, outcome.code, outcome.status) == (b"6\n", 3, "ended")
