"""Launcher `local`: `lm run` on this machine in one or several processes, under a supervisor that restarts them."""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.config.field import Range
from lm.experiment import Experiment, to_dict
from lm.launch.job import Job, check_mesh
from lm.launch.launcher import Flag, Launch, Launcher
from lm.launch.supervisor import Limits, WorkerProcess, supervise
from lm.train.run_folder import RunFolder

MOST = Range(least=1, most=1024)  # processes, or simulated devices of each


@dataclass(frozen=True)
class Processes:
    """Number of processes, and of simulated CPU devices of each (None: the machine's own devices)."""

    count: int = 1
    devices: int | None = None


def workers(job: Job, processes: Processes, port: int | str) -> list[WorkerProcess]:
    """The processes of one start. The first inherits this process's output, the others write logs in the run folder."""
    command = job.command(sys.executable, "-m", "lm.cli.main")
    devices = {} if processes.devices is None else {"JAX_NUM_CPU_DEVICES": str(processes.devices)}
    if processes.count == 1:
        return [WorkerProcess(command, devices, None)]
    join = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes.count)}
    logs = Path(job.run_dir) / "logs"
    return [
        WorkerProcess(command, join | {"JAX_PROCESS_ID": str(i)} | devices, logs / f"process-{i}.log" if i else None)
        for i in range(processes.count)
    ]


def script(job: Job, processes: Processes) -> str:
    """The text of a dry run: a shell command line for each process."""
    lines = ["# Started together by a supervisor, with a free PORT each time, again whenever one dies."]
    for worker in workers(job, processes, "PORT"):
        names = [f"{name}={shlex.quote(value)}" for name, value in worker.environment.items()]
        log = [">>", shlex.quote(str(worker.log)), "2>&1"] if worker.log else []
        lines.append(" ".join([*names, shlex.join(worker.command), *log]))
    return "\n".join(lines) + "\n"


def run(job: Job, processes: Processes, experiment: Experiment) -> int:
    """Supervise the run until it finishes or restarting is useless; returns the exit code.

    Raises:
        UserError: the run folder belongs to another experiment, or is in use.
    """
    folder = RunFolder(Path(job.run_dir))
    if processes.count > 1:  # claim the folder before logs are written into it
        with folder.lock():
            folder.claim(to_dict(experiment))
    return supervise(
        lambda: workers(job, processes, free_port()),
        lambda: newest_checkpoint(folder, [stage.name for stage in experiment.stages]),
        Limits(job.max_restarts, job.grace),
        say=lambda line: print(f"lm launch: {line}", file=sys.stderr, flush=True),
    )


def newest_checkpoint(folder: RunFolder, stages: Sequence[str]) -> str:
    """Description of the newest checkpoint: `step N of STAGE`, or `the beginning`."""
    for stage in reversed(stages):
        steps = [int(path.parent.name) for path in folder.checkpoints(stage).glob("*/manifest.json")]
        if steps:
            return f"step {max(steps)} of {stage}"
    return "the beginning"


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _launch(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    processes = Processes(arguments.processes or 1, arguments.devices_per_process)
    if processes.devices:  # otherwise the number of devices is not known before jax starts
        asked = f"--processes {processes.count} --devices-per-process {processes.devices}"
        check_mesh(experiment, processes.count * processes.devices, 1, asked, "cpu")
    return Launch(script(job, processes), lambda: run(job, processes, experiment))


LAUNCHER = Launcher(
    name="local",
    help="processes on this machine, under a supervisor",
    flags={
        "--processes": Flag("N", "number of processes of the job (1)", range=MOST),
        "--devices-per-process": Flag("N", "number of simulated CPU devices of each process", range=MOST),
    },
    launch=_launch,
)
