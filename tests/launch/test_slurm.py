"""The batch script on a real Slurm of one node, started here where Debian's slurm-wlm and munge are installed."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lm.launch.job import Job, hand_over
from lm.launch.local import free_port
from lm.launch.slurm import Nodes, render

DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster():
    """Slurm's daemons in a folder of their own; `SLURM_CONF` leads sbatch and the others to them."""
    places = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in DAEMONS}
    missing = [name for name, place in places.items() if place is None]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}); Debian has it in the packages slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # the path of a socket must be short
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, folder=folder, user=getpass.getuser(), controller=free_port(), node=free_port())
    )
    munge = [f"--{name}={folder}/munge.{end}" for name, end in
             {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}.items()]  # fmt: skip
    commands = [[places["munged"], "--force", "--foreground", *munge], [places["slurmctld"], "-D"], [places["slurmd"], "-D"]]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        daemons = []
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                time.sleep(0.5)
            until(lambda: shown("sinfo", "-h", "-o", "%t") == "idle", folder)
            yield folder
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()
            shutil.rmtree(folder)


def shown(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def until(condition, folder: Path) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        time.sleep(0.1)


def job(folder: Path, **changes) -> Job:
    values = {"name": "pod-run", "experiment": "pod.py", "overrides": (), "run_dir": f"{folder}/my run", "until": None}
    return Job(**(values | {"max_restarts": 1, "grace": 60} | changes))


def test_sbatch_accepts_the_script(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = render(job(tmp_path), Nodes(1, time="00:10:00", partition="main")).text
    tested = subprocess.run(["sbatch", "--test-only"], input=text, text=True, capture_output=True)
    assert tested.returncode == 0 and "to start at" in tested.stderr, tested.stderr
    wrong = subprocess.run(["sbatch", "--test-only"], input=text.replace("=main", "=none"), text=True, capture_output=True)  # fmt: skip
    assert wrong.returncode != 0, "a test that refuses nothing tells nothing"


# What stands in for Python and `lm run`: at its first start it waits to be told to save, at its second and third it is
# killed (a checkpoint was added in between), at its fourth too, which is one restart too many.
STAND_IN = """#!{python}
import os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
start = len(list(folder.glob("start-*"))) + 1
names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
(folder / f"start-{{start}}").write_text(" ".join([*(os.environ[name] for name in names), *sys.argv[1:]]))
if start == 1:
    def save(number, frame):
        (folder / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    (folder / "ready").touch()
    time.sleep(600)
checkpoint = folder / "my run/stages/pretrain/checkpoints" / f"{{min(start, 3):08d}}"
checkpoint.mkdir(parents=True, exist_ok=True)
(checkpoint / "manifest.json").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stopped_job_saves_and_is_not_queued_again(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    handover = render(job(tmp_path), Nodes(1))
    hand_over(handover)
    number = capfd.readouterr().out.split()[-1]
    until((tmp_path / "ready").exists, cluster)
    (stop,) = (line for line in handover.next if line.startswith("stop: "))
    command = stop.removeprefix("stop: ").split(" (")[0].replace("JOB", number)
    subprocess.run(command.split(), check=True)
    until(lambda: shown("squeue", "-h", "-j", number, "-t", "PD,R,CG") == "", cluster)
    assert (tmp_path / "saved").exists()
    said = (tmp_path / f"pod-run-{number}.log").read_text().splitlines()
    assert said[-1] == "lm launch: stopped; submit it again to go on"


def test_a_job_saves_when_its_time_is_up_and_is_restarted_after_deaths_until_they_gain_nothing(
    cluster, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    hand_over(render(job(tmp_path), Nodes(1)))
    number = capfd.readouterr().out.split()[-1]
    log = tmp_path / f"pod-run-{number}.log"

    until((tmp_path / "ready").exists, cluster)
    subprocess.run(["scancel", "--signal=USR1", "--batch", number], check=True)  # as Slurm does before the limit
    for start in (2, 3, 4):
        until(lambda: shown("squeue", "-h", "-j", number, "-o", "%t") == "PD", cluster)
        subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)  # it would wait a while
        until((tmp_path / f"start-{start}").exists, cluster)
    until(lambda: shown("squeue", "-h", "-j", number, "-t", "PD,R,CG") == "", cluster)

    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "start-5").exists()
    said = [
        line for line in log.read_text().splitlines() if line.startswith("lm launch") and "requeued so far" not in line
    ]
    again = "a process ended with code 137; restart 1 of 1 without a new checkpoint"
    given_up = "a process ended with code 137; no new checkpoint in 1 restarts: given up"
    assert said == [f"lm launch: {line}" for line in ("the time is up; queued again", again, again, given_up)]
    address, processes, index, *words = (tmp_path / "start-1").read_text().split(" ", 3)
    host, port = address.split(":")
    assert host == socket.gethostname().split(".")[0] and 1024 < int(port) < 65536
    assert (processes, index) == ("1", "0")
    assert words == [f"-m lm.cli.main run pod.py --run-dir {tmp_path}/my run"]
