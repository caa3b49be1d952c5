"""The supervisor, with small programs in the place of `lm run`: what it restarts, what it passes on, when it gives up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.launch import supervisor
from lm.launch.supervisor import Limits, WorkerProcess, supervise
from lm.parent_death import with_parent

# Each program has the folder, its index and the number of its start.
PRELUDE = """
import os, pathlib, signal, sys, time
folder, index, start = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def wait_for(name):
    while not (folder / name).exists(): time.sleep(0.01)
(folder / f"pid-{start}-{index}").write_text(str(os.getpid()))
"""


class Program:
    """Several processes of one stand-in; counts its starts, and what `newest` says is in the file `newest`."""

    def __init__(self, folder: Path, text: str, processes: int = 2):
        self.folder, self.processes, self.starts, self.said = folder, processes, 0, []
        (folder / "program.py").write_text(PRELUDE + text)

    def workers(self) -> list[WorkerProcess]:
        self.starts += 1
        program = (sys.executable, str(self.folder / "program.py"), str(self.folder))
        return [
            WorkerProcess(
                (*program, str(i), str(self.starts)), {"INDEX": str(i)}, self.folder / f"log-{i}" if i else None
            )
            for i in range(self.processes)
        ]

    def newest(self) -> str:
        path = self.folder / "newest"
        return path.read_text() if path.exists() else "the beginning"

    def run(self, max_restarts: int = 3) -> int:
        return supervise(self.workers, self.newest, Limits(max_restarts, grace=300), self.said.append)

    def gone(self, start: int, index: int) -> bool:
        """Whether that process has ended."""
        pid = int((self.folder / f"pid-{start}-{index}").read_text())
        return not Path(f"/proc/{pid}").exists()


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.5)


def test_all_that_finish_are_not_started_again(tmp_path, capfd):
    program = Program(tmp_path, "print('index', os.environ['INDEX'])")
    assert program.run() == 0
    assert program.starts == 1 and not program.said
    assert capfd.readouterr().out == "index 0\n"
    assert (tmp_path / "log-1").read_text().splitlines()[1:] == ["index 1"]


def test_a_death_ends_the_others_and_starts_all_again(tmp_path):
    stuck = """
if start == 1 and index == 0:
    time.sleep(600)  # as in a collective: it hears nothing
if start == 1 and index == 1:
    wait_for("pid-1-0")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    program = Program(tmp_path, stuck)
    assert program.run() == 0
    assert program.starts == 2 and program.gone(1, 0)
    assert program.said == [
        f"process 1 of 2 was killed by SIGKILL (its output: {tmp_path / 'log-1'}): "
        "restart 1 of 3 without a new checkpoint, from the beginning, in 0 s"
    ]


def test_it_gives_up_after_restarts_that_gain_nothing(tmp_path):
    program = Program(tmp_path, "sys.exit(7)", processes=1)
    assert program.run(max_restarts=2) == 1
    assert program.starts == 3
    assert [line.split(": ")[0] for line in program.said] == ["process 0 of 1 ended with code 7"] * 3
    assert "given up after 2 restarts without a new checkpoint (the beginning)" in program.said[-1]


def test_restarts_that_gain_a_checkpoint_do_not_count(tmp_path):
    program = Program(tmp_path, "(folder / 'newest').write_text(f'step {start}'); sys.exit(start < 5)", processes=1)
    assert program.run(max_restarts=1) == 0
    assert program.starts == 5
    assert all("restart 1 of 1" in line for line in program.said)


def test_the_pause_grows_while_nothing_is_gained(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.03)
    waited = []
    wait = supervisor._Signals.wait

    def noted(self, seconds, children=True):
        if not children:
            waited.append(seconds)
        return wait(self, seconds, children)

    monkeypatch.setattr(supervisor._Signals, "wait", noted)
    assert Program(tmp_path, "sys.exit(1)", processes=1).run(max_restarts=4) == 1
    assert waited == [0.01, 0.02, 0.03, 0.03]


def test_an_error_of_the_users_ends_it_whatever_the_others_end_with(tmp_path):
    # The first to end has lost its peer; the one whose message explains it ends a moment later.
    errs = "wait_for('pid-1-0'); time.sleep(0.1 * index); sys.exit(2 if index else 134)"
    program = Program(tmp_path, errs)
    assert program.run() == 2
    assert program.starts == 1
    assert program.said == [
        f"process 1 of 2 ended with code 2 (its output: {tmp_path / 'log-1'}): a restart would end in the same error"
    ]


def test_processes_that_were_asked_to_stop_are_not_started_again(tmp_path):
    program = Program(tmp_path, "sys.exit(130)")
    assert program.run() == 130
    assert program.starts == 1 and "stopped by a signal" in program.said[0]


DRIVER = """
import sys
from pathlib import Path
from lm.launch import supervisor
from tests.launch.test_supervisor import Program
supervisor.FIRST_PAUSE, supervisor.END_SECONDS = float(sys.argv[2]), 0.5
program = Program(Path(sys.argv[1]), sys.stdin.read())
code = supervisor.supervise(
    program.workers, program.newest, supervisor.Limits(9, float(sys.argv[3])), lambda line: print(line, flush=True)
)
sys.exit(code)
"""


def supervised(folder: Path, text: str, pause: float = 0.01, grace: float = 300, prefix=()) -> subprocess.Popen:
    """A supervisor in a process of its own, to be sent signals."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", DRIVER, str(folder), str(pause), str(grace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stdin.write(text)
    process.stdin.close()
    process.stdin = None
    return process


def appears(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} has not appeared"
        time.sleep(0.01)


SAVES = """
def save(number, frame):
    (folder / f"{signal.Signals(number).name}-{index}").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
(folder / f"ready-{index}").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("sent, got", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_a_signal_is_passed_on_to_all_and_waited_for(tmp_path, sent, got):
    process = supervised(tmp_path, SAVES)
    for index in (0, 1):
        appears(tmp_path / f"ready-{index}")
    process.send_signal(signal.Signals[sent])
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert said == f"{sent}: stopping, with 300 s to save\n"
    assert (tmp_path / f"{got}-0").exists() and (tmp_path / f"{got}-1").exists()


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    process = supervised(tmp_path, SAVES, prefix=["nohup"])
    for index in (0, 1):
        appears(tmp_path / f"ready-{index}")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=300)[0] == "SIGTERM: stopping, with 300 s to save\n"


def test_what_does_not_stop_in_time_is_killed(tmp_path):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder / f'ready-{index}').touch(); time.sleep(600)"
    process = supervised(tmp_path, deaf, grace=0.3)
    for index in (0, 1):
        appears(tmp_path / f"ready-{index}")
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "still running after 0 s: killed" in said
    for index in (0, 1):
        assert not Path(f"/proc/{(tmp_path / f'pid-1-{index}').read_text()}").exists()


def test_a_signal_between_two_starts_ends_it(tmp_path):
    process = supervised(tmp_path, "sys.exit(1)", pause=600)
    assert "restart 1 of 9" in process.stdout.readline()
    process.terminate()
    assert process.communicate(timeout=300)[0] == "stopped while no process was running\n"
    assert process.returncode == 130


def test_a_command_that_does_not_exist_leaves_nothing_running(tmp_path):
    program = Program(tmp_path, "time.sleep(600)")
    first = program.workers()[0]
    with pytest.raises(FileNotFoundError):
        supervise(
            lambda: [first, WorkerProcess(("/nowhere/program",), {}, None)],
            program.newest,
            Limits(1, 1),
            program.said.append,
        )
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "program.py")], capture_output=True).stdout == b""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes at their parent's death")
def test_the_death_of_the_supervisor_ends_its_processes(tmp_path):
    """Killed, it can pass nothing on; processes that hear no signal end all the same, and nobody holds their files."""
    deaf = """
import fcntl
held = open(folder / f"lock-{index}", "w")
fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
(folder / f"ready-{start}-{index}").touch()
(folder / f"ready-{index}").touch()
wait_for("end")
"""
    process = supervised(tmp_path, deaf)
    for index in (0, 1):
        appears(tmp_path / f"ready-{index}")
    pids = [(tmp_path / f"pid-1-{index}").read_text() for index in (0, 1)]
    process.kill()
    process.communicate()
    until = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, "a process of a killed supervisor goes on"
        time.sleep(0.01)
    for path in tmp_path.glob("ready-*"):
        path.unlink()
    again = supervised(tmp_path, deaf)  # the locks are free: it would end with code 1 and be started again
    for index in (0, 1):
        appears(tmp_path / f"ready-{index}")
    (tmp_path / "end").touch()
    assert again.communicate(timeout=300)[0] == "" and again.returncode == 0


def test_what_ends_with_its_parent_keeps_words_descriptors_and_its_exit_code(tmp_path):
    reader, writer = os.pipe()
    code = f"import os, sys; os.write({writer}, ' '.join(sys.argv[1:]).encode()); sys.exit(7)"
    words = with_parent([sys.executable, "-c", code, "a b", "--", "$x"])
    done = subprocess.run(words, pass_fds=[writer])
    assert done.returncode == 7 and os.read(reader, 100) == b"a b -- $x"
    os.close(reader)
    os.close(writer)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes at their parent's death")
def test_what_begins_after_its_parents_death_ends(tmp_path):
    words = with_parent([sys.executable, "-c", "print('began')"])
    words[4] = "1" if os.getpid() != 1 else "2"  # started by another process than the one that is named
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
