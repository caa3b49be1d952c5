"""Launcher `slurm`: a batch script with one task per node, which saves before its time limit and is then requeued.

The processes find each other by environment variables that `lm run` reads. (By itself jax would give each task on Slurm
one device only.) Source: the manual pages of sbatch, srun, scancel and scontrol.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lm.config.field import Range
from lm.experiment import Experiment, UserError
from lm.launch import values
from lm.launch.job import SWEEP_GRACE, Handover, Job, check_mesh, local_folder_warning
from lm.launch.launcher import COUNT, JOB_NAME, Flag, Launch, Launcher, SweepWorkers, handover_launch

TEMPLATE = """\
#!/bin/bash
# A job for `sbatch`. The folder that it is submitted from, with its Python, must be one that all nodes see.
{directives}
set -u

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS=$first:$((61440 + SLURM_JOB_ID % 4096)) JAX_NUM_PROCESSES={nodes}{devices}
echo "lm launch: $(date) on $SLURM_JOB_NODELIST, requeued so far: ${{SLURM_RESTART_COUNT:-0}}"

# Shortly before the time is up Slurm signals this script: all tasks save and end, and the job is queued again.
time_is_up=
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# shellcheck disable=SC2016  # it is for each task to expand
srun --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 \\
    bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' bash \\
    {command} &
step=$!
code=0
wait "$step" || code=$?
if [[ -n "$time_is_up" ]]; then
    wait "$step"
    echo "lm launch: the time is up; queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
case $code in
    0) exit 0 ;;
    2) echo "lm launch: a restart would end in the same error"; exit 2 ;;
    130) echo "lm launch: stopped; submit it again to go on"; exit 130 ;;
esac

# Restarts in a row that have added no checkpoint are counted beside the log.
counted={name}-$SLURM_JOB_ID.restarts
checkpoints=$(find {run_dir}/stages -path '*/checkpoints/*/manifest.json' 2>/dev/null | sort | cksum | cut -d ' ' -f 1)
restarts=0 before=
if [[ -f "$counted" ]]; then read -r restarts before <"$counted"; fi
if [[ "$before" != "$checkpoints" ]]; then restarts=0; fi
if ((restarts >= {max_restarts})); then
    echo "lm launch: a process ended with code $code; no new checkpoint in $restarts restarts: given up"
    exit "$code"
fi
echo "$((restarts + 1)) $checkpoints" >"$counted"
echo "lm launch: a process ended with code $code; restart $((restarts + 1)) of {max_restarts} without a new checkpoint"
exec scontrol requeue "$SLURM_JOB_ID"
"""

WORKERS = """\
#!/bin/bash
# Workers for `sbatch`. The folder that it is submitted from, with its Python, must be one that all nodes see.
{directives}
set -u
export JAX_NUM_PROCESSES=1  # every worker is by itself

# Shortly before the time is up the trial saves, and this worker is queued again.
time_is_up=
trap 'time_is_up=yes; kill -TERM "$worker"' USR1
{command} &
worker=$!
code=0
wait "$worker" || code=$?
if [[ -n "$time_is_up" ]]; then
    wait "$worker"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


@dataclass(frozen=True)
class Nodes:
    """Requested nodes and options of a Slurm job."""

    nodes: int
    gpus: int | None = None  # GPUs per node; None: one CPU device
    time: str | None = None
    partition: str | None = None
    account: str | None = None

    @property
    def devices(self) -> int:
        """Number of JAX devices of all nodes; a node without GPUs counts as one."""
        return self.nodes * (self.gpus or 1)


def render(job: Job, nodes: Nodes) -> Handover:
    """Render the script for `sbatch`.

    Raises:
        UserError: the time limit is not longer than the grace period for saving.
    """
    check_time(nodes.time, job.grace)
    own = {"nodes": nodes.nodes, "ntasks-per-node": 1, "exclusive": ""}
    text = TEMPLATE.format(
        directives=_directives(job.name, own, nodes, job.grace, f"{job.name}-%j.log"),
        nodes=nodes.nodes,
        devices=f" JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(nodes.gpus)))}" if nodes.gpus else "",
        command=shlex.join(job.command(sys.executable, "-m", "lm.cli.main")),
        name=job.name,
        run_dir=shlex.quote(job.run_dir),
        max_restarts=job.max_restarts,
    )
    return Handover(
        text=text,
        command=("sbatch",),
        tools=("sbatch",),
        next=(
            f"watch: tail -F {job.name}-JOB.log",
            "stop: scancel --signal=TERM JOB (all save; scancel JOB leaves them the cluster's KillWait, often 30 s)",
        ),
    )


def check_time(limit: str | None, grace: int) -> None:
    """Raise UserError unless the time limit is longer than the grace period for saving."""
    seconds = values.slurm_seconds(limit) if limit else None
    if seconds is not None and seconds <= grace:
        raise UserError(
            f"--time {limit} is {seconds} seconds, of which the last {grace} are reserved for saving (--grace): give more time"
        )


def _directives(name: str, own: Mapping[str, object], nodes: Nodes, grace: int, output: str) -> str:
    """#SBATCH lines of a job's own options and of those all jobs have, without those that are None; an empty value makes a switch."""
    options = {
        "job-name": name,
        **own,
        "gpus-per-node": nodes.gpus,
        "time": nodes.time,
        "partition": nodes.partition,
        "account": nodes.account,
        "signal": f"B:USR1@{grace}",
        "requeue": "",
        "open-mode": "append",
        "output": output,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return "\n".join(f"#SBATCH --{name}={value}".removesuffix("=") for name, value in given.items())


def sweep_workers(name: str, words: list[str], count: int, nodes: Nodes) -> Handover:
    """Render an array of `count` jobs for `sbatch`, each on one node, whole unless it asks for GPUs: a task has one core by default.

    Raises:
        UserError: the time limit is not longer than the grace period for saving.
    """
    check_time(nodes.time, SWEEP_GRACE)
    own = {"array": f"1-{count}", "nodes": 1, "ntasks": 1} | ({} if nodes.gpus else {"exclusive": ""})
    text = WORKERS.format(
        directives=_directives(name, own, nodes, SWEEP_GRACE, f"{name}-%A_%a.log"),
        command=shlex.join([sys.executable, "-m", "lm.cli.main", *words]),
    )
    watch = f"watch: tail -F {name}-JOB_1.log"
    return Handover(text=text, command=("sbatch",), tools=("sbatch",), next=(watch, "stop: scancel JOB"))


def _options(arguments: argparse.Namespace, nodes: int) -> Nodes:
    return Nodes(nodes, arguments.gpus_per_node, arguments.time, arguments.partition, arguments.account)


def _launch(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    nodes = _options(arguments, arguments.nodes or 1)
    gpus = f" --gpus-per-node {nodes.gpus}" if nodes.gpus else ""
    check_mesh(experiment, nodes.devices, 1, f"--nodes {nodes.nodes}{gpus}", "gpu" if nodes.gpus else "cpu")
    handover = render(job, nodes)
    warning = local_folder_warning(job.run_dir)
    if warning:
        print(f"lm launch: {warning}", file=sys.stderr)
    return handover_launch(handover)


def _hand_over_workers(
    arguments: argparse.Namespace, name: str, words: list[str], folders: Mapping[str, str]
) -> Handover:
    for flag, folder in folders.items():
        if warning := local_folder_warning(folder, flag):
            print(f"lm sweep: {warning}", file=sys.stderr)
    return sweep_workers(name, words, arguments.workers, _options(arguments, 1))


LAUNCHER = Launcher(
    name="slurm",
    help="""\
a batch script, with sbatch. This folder and its Python must be on a
file system that all nodes see""",
    flags=JOB_NAME
    | {
        "--nodes": Flag("N", "number of nodes, with one process each (1)", range=COUNT),
        "--gpus-per-node": Flag("N", "GPUs of each node (default: one CPU device)", range=Range(least=1, most=64)),
        "--time": Flag("TIME", "time limit, such as 1-00:00:00, after which the job is requeued", values.time_problem),
        "--partition": Flag("NAME", "partition (default: the cluster's)", values.PARTITION.problem),
        "--account": Flag("NAME", "account that is charged", values.ACCOUNT.problem),
    },
    launch=_launch,
    workers=SweepWorkers(("--gpus-per-node", "--time", "--partition", "--account"), _hand_over_workers),
)
