"""The jail of a machine: which kind is used, what is said where there is none, and what happens when a process of it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lm.experiment import UserError
from lm.sandbox import jail as jail_module
from lm.sandbox.jail import KINDS, Jail, JailLimits, find_jail, jail_of_kind, program
from lm.sandbox.system_calls import CLONE, CLONE3, MACHINES, NUMBERS, SOCKETS, filter_program


@pytest.fixture(scope="module")
def jail() -> Jail:
    try:
        return find_jail()
    except UserError as error:
        pytest.skip(str(error))


def test_the_first_kind_that_works_is_used(monkeypatch, jail):
    def broken() -> Jail:
        return Jail("bubblewrap", "a broken bubblewrap", "/bin/false")

    monkeypatch.setattr(jail_module, "KINDS", {"broken": broken, jail.kind: KINDS[jail.kind]})
    found = find_jail.__wrapped__()
    assert (found.kind, found.about) == (jail.kind, jail.about)
    found.close()


def test_a_machine_without_a_jail_is_refused_in_one_line(monkeypatch):
    broken = {f"{name}s": lambda name=name: Jail("bubblewrap", f"{name} wrap", "/bin/false") for name in ("one", "two")}
    monkeypatch.setattr(jail_module, "KINDS", broken)
    with pytest.raises(
        UserError, match=r"this machine cannot jail model-written code: one wrap .*; two wrap .* bubblewrap"
    ) as caught:
        find_jail.__wrapped__()
    assert "\n" not in str(caught.value)


def test_a_bubblewrap_that_does_not_run_is_told_in_one_line(monkeypatch, tmp_path):
    """Of another architecture, for instance."""
    (tmp_path / "bwrap").write_bytes(b"\x7fELF")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^sandbox: .*bwrap does not run: \[Errno 8\] Exec format error: [^\n]*$"):
        jail_of_kind("bubblewrap")


def test_a_jail_that_holds_nothing_is_found_out(monkeypatch):
    monkeypatch.setitem(KINDS, "open", lambda: Jail("none", "an open jail"))
    with pytest.raises(UserError, match="an open jail does not hold a program"):
        jail_of_kind("open")


def test_without_a_jail_programs_are_still_limited():
    found = find_jail(unjailed=True)
    assert found.kind == "none"
    assert found.run(program("print(1)")).stdout == b"1\n"
    assert found.run(program("while True: pass"), JailLimits(seconds=0.5)).status == "timeout"
    code = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\nprint(os.getpid())"
    outcome = found.run(program(code), JailLimits(seconds=60.0))
    assert outcome.ok


def test_programs_of_several_threads_run_at_the_same_time(jail):
    codes = [program(f"import time; time.sleep(0.2); print({number})") for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert [int(one.stdout) for one in threads.map(jail.run, codes)] == list(range(8))


def test_the_jails_end_with_a_process_that_is_killed(jail):
    name = f"orphan{os.getpid()}"
    code = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0); time.sleep(900)"
    script = (
        f"from lm.sandbox.jail import *; jail_of_kind({jail.kind!r}).run(program({code!r}), JailLimits(seconds=900.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    assert eventually(lambda: named(name))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert eventually(lambda: not named(name))


def test_a_program_that_the_kernel_kills_has_run_out_of_cpu_time(jail):
    """As on a machine so busy that the process that keeps the limits gets no time itself."""
    found, name = jail_of_kind(jail.kind), f"busy{os.getpid()}"
    code = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\nwhile True: pass"
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(found.run, program(code), JailLimits(seconds=600.0, cpu_seconds=1.0))
        assert eventually(lambda: named(name))
        (supervisor,) = Path(f"/proc/{found._warden.pid}/task/{found._warden.pid}/children").read_text().split()
        os.kill(int(supervisor), signal.SIGSTOP)
        assert eventually(lambda: not named(name))
        os.kill(int(supervisor), signal.SIGCONT)
        assert outcome.result().status == "cpu"
    found.close()


def test_a_killed_warden_is_replaced(jail):
    found = jail_of_kind(jail.kind)
    found._warden.kill()
    found._warden.wait()
    assert found.run(program("print(1)")).ok
    found.close()


def named(name: str) -> bool:
    """Whether a process has that name."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def eventually(holds) -> bool:
    """Whether something holds within five minutes."""
    deadline = time.monotonic() + 300
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_the_numbers_of_system_calls_are_those_of_the_kernel(column, header):
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    found = dict(re.findall(r"#define\s+__NR_(\w+)\s+(\d+)", Path(header).read_text()))
    numbers = {**NUMBERS, **SOCKETS, "clone": CLONE, "clone3": CLONE3}
    wrong = {name: number[column] for name, number in numbers.items() if int(found.get(name, -1)) != number[column]}
    assert not wrong


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_fits_the_kernel(machine):
    assert len(filter_program(machine)) // 8 < 4096
