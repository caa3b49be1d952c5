"""Launch an experiment on a pod, a cluster, or this machine (--on, listed below).

With --dry-run it prints exactly what would be submitted, and does nothing.

The job runs `lm run EXPERIMENT` with the same overrides. After a crash
all hosts continue from the newest checkpoint, so the run's
folder must be one that all hosts see: gke and tpu-vm mount it (--volume), a
bucket with a hierarchical namespace, in which folders can be renamed. Secrets
belong in the cluster (--secret NAME): no option takes one, none is rendered.

  lm launch quickstart --on local --processes 2 --devices-per-process 2
  lm launch EXPERIMENT --on gke --topology v5p:2x4x4 --image IMAGE \\
      --volume gs://BUCKET:/mnt/runs --run-dir /mnt/runs/NAME --dry-run"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from lm.cli.arguments import EXPERIMENT_HELP, NumberIn, at_least, check_stage, folder_path, resolve
from lm.experiment import UserError
from lm.launch.job import Job, check_command_words, job_name
from lm.launch.launcher import COUNT, Launcher, value_of
from lm.launch.table import FLAGS, LAUNCHERS, launchers_with
from lm.launch.values import LARGEST, valid_text

TAKES_OVERRIDES = True
MOST_GRACE = 65535  # seconds between a signal and the end of a job that sbatch takes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm launch EXPERIMENT --on WHERE [options] [--a.b.c VALUE ...]"
    parser.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    parser.add_argument("--on", choices=list(LAUNCHERS), required=True, help="place to launch on, see below")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted and do nothing")
    parser.add_argument("--run-dir", metavar="DIR", type=folder_path, help="folder of the run; else runs/NAME")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=at_least(0, LARGEST),
        help="give up after N consecutive restarts without a new checkpoint (3); with gke after N in all (20)",
    )
    parser.add_argument(
        "--grace",
        metavar="SECONDS",
        type=at_least(1, MOST_GRACE),
        default=300,
        help="time for saving between SIGTERM and SIGKILL (%(default)s)",
    )
    parser.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=NumberIn(int, COUNT),
        help="time that processes wait for each other at the start (gke, tpu-vm: 3600; others: as lm run)",
    )
    for name, flag in FLAGS.items():
        add_flag(parser, name, f"{', '.join(launchers_with(name))}: {flag.help}")
    places = (f"  {name:<7} {textwrap.indent(place.help, ' ' * 10).strip()}" for name, place in LAUNCHERS.items())
    parser.epilog = "\n".join(["--on:", *places])


def add_flag(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add a flag that only some launchers have."""
    flag = FLAGS[name]
    kind: dict[str, Any] = {"action": "store_true"}
    if flag.metavar:
        kind = {"metavar": flag.metavar, "action": "append" if flag.repeated else "store"}
    if flag.problem:
        kind["type"] = valid_text(flag.problem)
    if flag.range:
        kind["type"] = NumberIn(int, flag.range)
    parser.add_argument(name, help=help, **kind)


def call(arguments: argparse.Namespace) -> int:
    launcher = LAUNCHERS[arguments.on]
    check_flags(arguments, launcher)
    check_command_words((arguments.experiment, *arguments.overrides))
    experiment = resolve(arguments.experiment, arguments.overrides)
    check_stage(arguments.until, (stage.name for stage in experiment.stages), arguments.experiment)
    given = arguments.max_restarts
    job = Job(
        name=job_name(experiment, arguments.job_name) if "--job-name" in launcher.flags else experiment.name,
        experiment=arguments.experiment,
        overrides=tuple(arguments.overrides),
        run_dir=str(arguments.run_dir or f"runs/{experiment.name}"),
        until=arguments.until,
        max_restarts=launcher.max_restarts if given is None else given,
        grace=arguments.grace,
        join_timeout=arguments.join_timeout or launcher.join_timeout,
    )
    launch = launcher.launch(arguments, experiment, job)
    if arguments.dry_run:
        print(launch.text, end="")
        return 0
    return launch.go()


def check_flags(arguments: argparse.Namespace, launcher: Launcher) -> None:
    """Raise UserError for a flag that the launcher does not have, or a missing one that it needs."""
    for name in FLAGS:
        if value_of(arguments, name) not in (None, False) and name not in launcher.flags:
            raise UserError(f"{name} is for --on {' and '.join(launchers_with(name))}; this is --on {launcher.name}")
    check_required(arguments, launcher)


def check_required(arguments: argparse.Namespace, launcher: Launcher) -> None:
    """Raise UserError for a missing flag that the launcher needs."""
    for name in launcher.required:
        if value_of(arguments, name) is None:
            flag = launcher.flags[name]
            raise UserError(f"--on {launcher.name} needs {name} {flag.metavar}: {flag.help}")
