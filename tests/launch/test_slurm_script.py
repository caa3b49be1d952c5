"""The batch script run by bash, two tasks at once, with stand-ins for Slurm's commands: what each task is told, and what follows its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.launch.job import Job
from lm.launch.slurm import Nodes, render, sweep_workers

SRUN = """
tasks=1
while [[ $1 == --* ]]; do if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi; shift; done
started=() code=0
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task "$@" &
    started+=($!)
done
echo "${started[@]}" >tasks
for task in "${started[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = """
if [[ $1 == show ]]; then echo node1; echo node2; else echo "$@" >>requeued; fi
"""
SCANCEL = """
echo "$@" >>cancelled
kill -TERM $(cat tasks)
"""
# In the place of Python: notes what it was told; ends with the code that is wanted, or waits for a signal to save.
TASK = """
me=task-${JAX_PROCESS_ID:-alone}
printf '%s\\n' "${JAX_COORDINATOR_ADDRESS:-}" "$JAX_NUM_PROCESSES" "${JAX_LOCAL_DEVICE_IDS:-}" "$@" >"$me"
trap 'kill "$waiting" 2>/dev/null; touch "$me.saved"; exit 130' TERM
if [[ $(cat wanted) == wait ]]; then
    touch "$me.ready"
    sleep 60 &
    waiting=$!
    wait "$waiting"
fi
exit "$(cat wanted)"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with Slurm's commands, and nothing else of this machine's environment."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "python": TASK}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    return tmp_path


def begin(place: Path, text: str, wanted: str) -> subprocess.Popen:
    """The script, as Slurm's daemon starts it."""
    (place / "job.sh").write_text(text)
    (place / "wanted").write_text(wanted)
    environment = {
        "PATH": f"{place / 'programs'}:/usr/bin:/bin",
        "SLURM_JOB_ID": "5000",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    command = ["bash", "job.sh"]
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def job(**changes) -> Job:
    values = {"name": "pod-run", "experiment": "pod.py", "overrides": ("--prompts", 'it\'s "it"'), "run_dir": "my run"}
    return Job(**(values | {"until": None, "max_restarts": 1, "grace": 60} | changes))


@pytest.mark.parametrize("gpus", [None, 2])
def test_every_task_is_told_its_number_the_first_node_and_the_same_words(place, gpus):
    ran = begin(place, render(job(), Nodes(2, gpus=gpus)).text, "0")
    said, _ = ran.communicate(timeout=300)
    assert ran.returncode == 0 and not (place / "requeued").exists(), said
    told = [(place / f"task-{task}").read_text().splitlines() for task in range(2)]
    assert told[0] == told[1]
    assert told[0][:3] == ["node1:62344", "2", "0,1" if gpus else ""]  # a port of the job's own
    words = "-m lm.cli.main run pod.py --run-dir".split()
    assert told[0][3 : 3 + len(words)] == words and 'it\'s "it"' in told[0] and "my run" in told[0]


@pytest.mark.parametrize(("wanted", "requeued"), [("2", 0), ("130", 0), ("1", 1), ("75", 1), ("137", 1)])
def test_a_death_is_queued_again_until_it_gains_nothing_and_an_error_of_the_users_is_not(place, wanted, requeued):
    text = render(job(), Nodes(2)).text
    for start in range(requeued + 1):
        ran = begin(place, text, wanted)
        said, _ = ran.communicate(timeout=300)
        assert ran.returncode == (0 if start < requeued else int(wanted)), said
    asked = (place / "requeued").read_text().splitlines() if requeued else []
    assert asked == ["requeue 5000"] * requeued


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("tasks", ["0 1", "alone"])
def test_all_save_when_the_time_is_up_and_are_queued_again(place, tasks):
    """A job's tasks, and the worker of a sweep, by Slurm's signal to the script alone."""
    names = [f"task-{task}" for task in tasks.split()]
    workers = sweep_workers("pod-run", ["sweep", "x.py", "--worker"], 3, Nodes(1))
    ran = begin(place, (workers if tasks == "alone" else render(job(), Nodes(2))).text, "wait")
    until(lambda: all((place / f"{name}.ready").exists() for name in names))
    os.kill(ran.pid, signal.SIGUSR1)
    said, _ = ran.communicate(timeout=300)
    assert ran.returncode == 0, said
    assert all((place / f"{name}.saved").exists() for name in names)
    assert (place / "requeued").read_text() == "requeue 5000\n"
    assert tasks == "alone" or (place / "cancelled").read_text() == "--signal=TERM 5000\n"
