"""Launch an experiment on a pod, a cluster, or this machine.

With --dry-run it prints exactly what would be handed over, and does nothing.

  gke     a JobSet, by kubectl. The image holds this repository: its working
          folder is the root, `lm` is on its PATH (the Dockerfile makes it)
  tpu-vm  queued resources, by gcloud. The hosts get a git bundle of the
          current commit, and install it
  slurm   a batch script, by sbatch. This folder and its Python are on a file
          system that all nodes see
  local   processes on this machine, under a supervisor

What trains there is `lm run EXPERIMENT` with the same overrides. After a death
it goes on from the newest checkpoint, on all hosts together, so the run's
folder must be one that all hosts see: gke and tpu-vm mount it (--volume), a
bucket with a hierarchical namespace, in which folders can be renamed. Secrets
belong into the cluster (--secret NAME): no option takes one, none is rendered.

  lm launch quickstart --on local --processes 2 --devices-per-process 2
  lm launch EXPERIMENT --on gke --topology v5p:2x4x4 --image IMAGE \\
      --volume gs://BUCKET:/mnt/runs --run-dir /mnt/runs/NAME --dry-run"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lm.cli.arguments import EXPERIMENT_HELP, at_least, check_stage, resolve
from lm.experiment import Experiment, UserError
from lm.launch import gke, local, slurm, tpu_vm, values
from lm.launch.job import Handover, Job, check_mesh, check_travels, check_words, hand_over, job_name, warn_of_local
from lm.launch.topology import Topology, parse_topology
from lm.launch.values import LARGEST, check_value, of
from lm.launch.volumes import parse_volumes

TAKES_OVERRIDES = True


@dataclass(frozen=True)
class Option:
    """A flag of some launchers; the others refuse it."""

    of: tuple[str, ...]
    metavar: str | None  # None: a switch
    help: str
    type: Callable[[str], Any] = str
    repeated: bool = False


def count(text: str) -> int:
    """An argparse type: an integer from 1 to what schedulers take."""
    return at_least(1, LARGEST)(text)


POD = ("gke", "tpu-vm")
MOST_GPUS, MOST_PROCESSES = 64, 1024  # of one machine
OPTIONS = {
    "--job-name": Option(("gke", "tpu-vm", "slurm"), "NAME", "of the job; else the experiment's"),
    "--topology": Option(POD, "NAME", "slice of TPUs, such as v5p:2x4x4"),
    "--slices": Option(POD, "N", "slices, joined by the data-centre network (1)", count),
    "--volume": Option(POD, "gs://BUCKET:/PATH", "storage to mount; of gke also pvc:CLAIM:/PATH", repeated=True),
    "--zone": Option(POD, "ZONE", "of tpu-vm; of gke for the xpk command only", of(values.ZONE.problem)),
    "--project": Option(
        POD, "PROJECT", "else gcloud's own; of gke for the xpk command only", of(values.PROJECT.problem)
    ),
    "--spot": Option(POD, None, "preemptible (spot) machines"),
    "--service-account": Option(POD, "NAME", "what the hosts are allowed to do; of tpu-vm an e-mail address"),
    "--skip-memory-check": Option(POD, None, "launch although a stage does not fit into memory (lm plan)"),
    "--image": Option(("gke",), "IMAGE", "container image that holds this repository", of(values.image_problem)),
    "--namespace": Option(("gke",), "NAME", "of Kubernetes; else kubectl's own", of(values.NAMESPACE.problem)),
    "--queue": Option(("gke",), "NAME", "LocalQueue of Kueue", of(values.QUEUE.problem)),
    "--secret": Option(
        ("gke",), "NAME", "Secret of Kubernetes whose entries become environment variables", of(values.OBJECT.problem)
    ),
    "--cluster": Option(("gke",), "NAME", "for the xpk command only", of(values.CLUSTER.problem)),
    "--runtime-version": Option(
        ("tpu-vm",), "NAME", "software of the hosts; else the usual one", of(values.RUNTIME.problem)
    ),
    "--reserved": Option(("tpu-vm",), None, "machines of the project's reservation"),
    "--nodes": Option(("slurm",), "N", "nodes, a process each (1)", count),
    "--gpus-per-node": Option(("slurm",), "N", "else a node is one CPU device", at_least(1, MOST_GPUS)),
    "--time": Option(
        ("slurm",), "TIME", "limit, such as 1-00:00:00; the job is queued again when it is up", of(values.time_problem)
    ),
    "--partition": Option(("slurm",), "NAME", "else the cluster's own", of(values.PARTITION.problem)),
    "--account": Option(("slurm",), "NAME", "which pays", of(values.ACCOUNT.problem)),
    "--processes": Option(("local",), "N", "processes that make one job (1)", at_least(1, MOST_PROCESSES)),
    "--devices-per-process": Option(("local",), "N", "simulated CPU devices of each", at_least(1, MOST_PROCESSES)),
}
RESTARTS = {"gke": 20, "tpu-vm": 3, "slurm": 3, "local": 3}
# Machines of a pod come, and come back, at different times; to give up is an error that no restart mends.
JOIN_TIMEOUT = {"gke": 3600, "tpu-vm": 3600}
MOST_GRACE = 65535  # seconds between a signal and the end of a job that sbatch takes


@dataclass(frozen=True)
class Launch:
    """What a dry run prints, and what else happens; `go` returns an exit code."""

    text: str
    go: Callable[[], int]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm launch EXPERIMENT --on WHERE [options] [--a.b.c VALUE ...]"
    parser.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    parser.add_argument("--on", choices=list(LAUNCHERS), required=True, help="where; see above")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument(
        "--run-dir", metavar="DIR", type=of(values.path_problem), help="folder of the run; else runs/NAME"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=at_least(0, LARGEST),
        help="give up after so many in a row without a new checkpoint (3); of gke so many in all (20)",
    )
    parser.add_argument(
        "--grace",
        metavar="SECONDS",
        type=at_least(1, MOST_GRACE),
        default=300,
        help="time to save in when asked to stop (%(default)s)",
    )
    parser.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=count,
        help="how long processes wait for each other at a start; gke, tpu-vm: 3600; else as of lm run",
    )
    for flag, option in OPTIONS.items():
        add_option(parser, flag, f"{', '.join(option.of)}: {option.help}")


def add_option(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    """A flag of some launchers, for a command that hands over to them."""
    option = OPTIONS[flag]
    kind: dict[str, Any] = {"action": "store_true"}
    if option.metavar:
        kind = {"metavar": option.metavar, "type": option.type, "action": "append" if option.repeated else "store"}
    parser.add_argument(flag, help=help, **kind)


def call(arguments: argparse.Namespace) -> int:
    check_options(arguments)
    check_words((arguments.experiment, *arguments.overrides))
    experiment = resolve(arguments.experiment, arguments.overrides)
    check_stage(arguments.until, (stage.name for stage in experiment.stages), arguments.experiment)
    given = arguments.max_restarts
    job = Job(
        name=experiment.name if arguments.on == "local" else job_name(experiment, arguments.job_name),
        experiment=arguments.experiment,
        overrides=tuple(arguments.overrides),
        run_dir=arguments.run_dir or f"runs/{experiment.name}",
        until=arguments.until,
        max_restarts=RESTARTS[arguments.on] if given is None else given,
        grace=arguments.grace,
        join_timeout=arguments.join_timeout or JOIN_TIMEOUT.get(arguments.on),
    )
    launch = LAUNCHERS[arguments.on](arguments, experiment, job)
    if arguments.dry_run:
        print(launch.text, end="")
        return 0
    return launch.go()


def check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError at an option that the launcher has no use for."""
    for flag, option in OPTIONS.items():
        given = value_of(arguments, flag) not in (None, False)
        if given and arguments.on not in option.of:
            raise UserError(f"{flag} is for --on {' and '.join(option.of)}; this is --on {arguments.on}")


def value_of(arguments: argparse.Namespace, flag: str) -> Any:
    return getattr(arguments, flag.removeprefix("--").replace("-", "_"))


def needed(arguments: argparse.Namespace, flag: str) -> Any:
    """The value of a flag that the launcher cannot do without; UserError where it is not given."""
    value = value_of(arguments, flag)
    if value is None:
        raise UserError(f"--on {arguments.on} needs {flag} {OPTIONS[flag].metavar}: {OPTIONS[flag].help}")
    return value


def slices_of_tpus(arguments: argparse.Namespace, experiment: Experiment) -> tuple[Topology, int]:
    """The slices asked for, all of whose devices the experiment uses."""
    topology, slices = parse_topology(needed(arguments, "--topology")), arguments.slices or 1
    asked = f"--topology {arguments.topology}" + (f" --slices {slices}" if slices > 1 else "")
    with on_cpu():
        check_mesh(experiment, topology.devices * slices, slices, asked, "tpu")
    return topology, slices


def check_fits_memory(arguments: argparse.Namespace, experiment: Experiment, topology: Topology, slices: int) -> None:
    """Raises UserError at a stage that needs more memory than a device has, unless that is not to be looked at."""
    if arguments.skip_memory_check:
        return
    with on_cpu():
        from lm.launch.memory import check_memory  # jax: only where there is something to launch

        for line in check_memory(experiment, topology, slices, arguments.until):
            print(f"lm launch: {line}", file=sys.stderr)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Keep jax, if it is imported here, off the accelerators of this machine; what is started later may have them."""
    given = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if given is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = given


def handing_over(handover: Handover) -> Launch:
    def go() -> int:
        hand_over(handover)
        for line in handover.next:
            print(f"lm launch: {line}")
        return 0

    return Launch(handover.text, go)


def _gke(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    check_travels(job.experiment, "the files of the image only")
    topology, slices = slices_of_tpus(arguments, experiment)
    cluster = gke.Cluster(
        topology=topology,
        slices=slices,
        image=needed(arguments, "--image"),
        volumes=parse_volumes(arguments.volume or ()),
        namespace=arguments.namespace,
        queue=arguments.queue,
        service_account=check_value("--service-account", arguments.service_account, values.OBJECT),
        secret=arguments.secret,
        spot=arguments.spot,
        cluster=arguments.cluster,
        project=arguments.project,
        zone=arguments.zone,
    )
    handover = gke.render(job, cluster)
    check_fits_memory(arguments, experiment, topology, slices)
    return handing_over(handover)


def _tpu_vm(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    check_travels(job.experiment, "the files of the commit only")
    topology, slices = slices_of_tpus(arguments, experiment)
    asked = tpu_vm.Slices(
        topology=topology,
        slices=slices,
        zone=needed(arguments, "--zone"),
        volumes=parse_volumes(arguments.volume or ()),
        commit=tpu_vm.current_commit(),
        project=arguments.project,
        runtime=arguments.runtime_version,
        service_account=check_value("--service-account", arguments.service_account, values.ACCOUNT_EMAIL),
        spot=arguments.spot,
        reserved=arguments.reserved,
    )
    handover = tpu_vm.render(job, asked)
    check_fits_memory(arguments, experiment, topology, slices)
    return handing_over(handover)


def _slurm(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    nodes = slurm.Nodes(
        nodes=arguments.nodes or 1,
        gpus=arguments.gpus_per_node,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
    )
    gpus = f" --gpus-per-node {nodes.gpus}" if nodes.gpus else ""
    check_mesh(experiment, nodes.devices, 1, f"--nodes {nodes.nodes}{gpus}", "gpu" if nodes.gpus else "cpu")
    handover = slurm.render(job, nodes)
    warning = warn_of_local(job.run_dir)
    if warning:
        print(f"lm launch: {warning}", file=sys.stderr)
    return handing_over(handover)


def _local(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    processes = local.Processes(arguments.processes or 1, arguments.devices_per_process)
    if processes.devices:  # else it is not known before jax has looked
        asked = f"--processes {processes.count} --devices-per-process {processes.devices}"
        check_mesh(experiment, processes.count * processes.devices, 1, asked, "cpu")
    return Launch(local.script(job, processes), lambda: local.run(job, processes, experiment))


LAUNCHERS: dict[str, Callable[[argparse.Namespace, Experiment, Job], Launch]] = {
    "gke": _gke,
    "tpu-vm": _tpu_vm,
    "slurm": _slurm,
    "local": _local,
}
