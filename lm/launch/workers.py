"""Workers of a sweep on a cluster: jobs that have nothing to do with each other but the folder in which they find their trials.

A worker whose time is up, or whose machine is taken away, is started again; its trial goes on from the newest checkpoint,
there or in another worker. Sources: the manual pages of sbatch and scontrol; the Job API of Kubernetes (batch/v1).
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import yaml

from lm.experiment import UserError
from lm.launch import gke
from lm.launch.job import Handover
from lm.launch.slurm import Nodes, check_time
from lm.launch.volumes import check_run_dir

GRACE = 300  # seconds to save in
SLURM = """\
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


def on_slurm(name: str, words: list[str], count: int, nodes: Nodes) -> Handover:
    """An array of `count` jobs for `sbatch`, a node each.

    Raises:
        UserError: the time limit is over before a trial could save.
    """
    check_time(nodes.time, GRACE)
    options = {
        "job-name": name,
        "array": f"1-{count}",
        "nodes": 1,
        "ntasks": 1,
        "gpus-per-node": nodes.gpus,
        "time": nodes.time,
        "partition": nodes.partition,
        "account": nodes.account,
        "signal": f"B:USR1@{GRACE}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{name}-%A_%a.log",
    }
    given = {option: value for option, value in options.items() if value is not None}
    text = SLURM.format(
        directives="\n".join(f"#SBATCH --{option}={value}".removesuffix("=") for option, value in given.items()),
        command=shlex.join([sys.executable, "-m", "lm.cli.main", *words]),
    )
    watch = f"watch: tail -F {name}-JOB_1.log"
    return Handover(text=text, command=("sbatch",), tools=("sbatch",), next=(watch, "stop: scancel JOB"))


def on_gke(name: str, words: list[str], count: int, folders: tuple[str, ...], cluster: gke.Cluster) -> Handover:
    """A Job of `count` pods for `kubectl apply -f -`, each with all chips of one host.

    Raises:
        UserError: a slice has several hosts, or the folders are not on a volume on which files can be locked.
    """
    if cluster.topology.hosts > 1:
        raise UserError(
            f"--topology of {cluster.topology.shape} has {cluster.topology.hosts} hosts, and a worker is one: take a slice of one "
            "host, or start each trial by itself with lm launch"
        )
    locked = tuple(volume for volume in cluster.volumes if volume.claim)
    for folder in folders:
        check_run_dir(folder, locked, "is on no volume claim (pvc:), and in a bucket files cannot be locked")
    body = yaml.safe_dump(_manifest(name, words, count, cluster), sort_keys=False, width=1000)
    where = f" -n {cluster.namespace}" if cluster.namespace else ""
    return Handover(
        text="# Workers of a sweep, for `kubectl apply -f -`.\n" + body,
        command=("kubectl", "apply", "-f", "-"),
        tools=("kubectl",),
        next=(f"watch: kubectl logs -f job/{name} --all-pods{where}", f"stop: kubectl delete job {name}{where}"),
    )


def _manifest(name: str, words: list[str], count: int, cluster: gke.Cluster) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if cluster.namespace:
        metadata["namespace"] = cluster.namespace
    if cluster.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": cluster.queue}
    refused = {"containerName": gke.CONTAINER, "operator": "In", "values": [gke.EXIT_USER]}
    environment = [{"name": "JAX_NUM_PROCESSES", "value": "1"}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "parallelism": count,
            "completions": count,
            "backoffLimit": 20 * count,  # machines are taken away more often than workers die
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": refused}]},
            "template": {"spec": gke.pod_spec(["lm", *map(gke.literal, words)], environment, GRACE, cluster)},
        },
    }
