"""Run a sweep: one `lm run` for each trial (values of the axes and a seed).

  lm sweep ablations.pretraining --dry-run
  lm sweep ablations.pretraining --workers 2
  lm compare sweeps/pretraining
  lm report sweeps/pretraining/trials/KEY               report of one trial

Any number of workers share the trials, here and on other hosts that share the
sweep's folder: start the same command there. A worker that dies is replaced,
and its trial resumes from the newest checkpoint. The same command again resumes
the sweep; with more seeds or axis values it adds the missing trials. Stages
that trials share are trained once. A setting that is invalid, diverges or
crashes is a failed trial: the others continue, and --retry-failed repeats it.
Exit codes: 1 a trial failed, 2 an error of the user, 130 and 143 stopped and
saved (Ctrl-C, SIGTERM).

On a cluster, `--on` submits --workers jobs with one worker each: slurm with
sbatch, gke with kubectl. The sweep's folder must be on a file system that all
of them share and that supports file locks (NFS, Lustre, a volume claim; not a
bucket)."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from lm.cli.arguments import add_cache, at_least, folder_path, given_flags
from lm.cli.launch import add_flag, check_required
from lm.experiment import UserError
from lm.launch.job import hand_over, job_name
from lm.launch.launcher import value_of
from lm.launch.table import FLAGS, LAUNCHERS
from lm.sweep.sweep import STORE, Sweep, folder_of, load

TAKES_OVERRIDES = False
SWEEP_HELP = "a name in experiments/ (ablations.pretraining), or the path of a .py file that defines `sweep`"
EXIT_FAILED = 1  # some trial failed
CLUSTERS = {name: launcher.workers for name, launcher in LAUNCHERS.items() if launcher.workers}
CLUSTER_FLAGS = {flag: None for workers in CLUSTERS.values() for flag in workers.flags}  # each once, in order


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP_HELP)
    parser.add_argument(
        "--workers", metavar="N", type=at_least(1, 1000), default=1, help="trials at the same time (%(default)s)"
    )
    parser.add_argument("--folder", metavar="DIR", type=folder_path, help="folder of the sweep; else sweeps/NAME")
    parser.add_argument(
        "--store",
        metavar="DIR",
        type=folder_path,
        default=STORE,
        help="folder of the stages that trials share, also with other sweeps (%(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the trials (also those that cannot run) with their time and disk space, and do nothing",
    )
    parser.add_argument("--on", choices=list(CLUSTERS), help="submit --workers jobs to a cluster, see above")
    for flag in CLUSTER_FLAGS:
        extra = "; with --dry-run: cost in hours of these TPUs" if flag == "--topology" else ""
        add_flag(parser, flag, f"{', '.join(where(flag))}: {FLAGS[flag].help}{extra}")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    parser.add_argument("--join", metavar="NAME", help=argparse.SUPPRESS)  # one of several workers, started by this one
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    from lm.stored import cache_at
    from lm.sweep.trials import check_sweep

    sweep = load(arguments.sweep)
    check_sweep(sweep)
    folder = arguments.folder or folder_of(sweep)
    if arguments.dry_run and arguments.on is None:
        from lm.sweep.folder import SweepFolder
        from lm.sweep.show import dry_run

        print(dry_run(sweep, SweepFolder(folder, arguments.store), arguments.topology))
        return 0
    for flag in CLUSTER_FLAGS:
        if value_of(arguments, flag) not in (None, False) and (arguments.on is None or arguments.on not in where(flag)):
            raise UserError(f"{flag} is for --on {' and '.join(where(flag))}")
    if arguments.on:
        return hand_over_workers(arguments, sweep, folder)
    with cache_at(arguments.cache):
        return _work(arguments, sweep, folder)


def where(flag: str) -> list[str]:
    """Names of the clusters whose workers have a flag."""
    return [name for name, workers in CLUSTERS.items() if flag in workers.flags]


def hand_over_workers(arguments: argparse.Namespace, sweep: Sweep, folder: Path) -> int:
    """Submit jobs of one worker each; a dry run prints what would be submitted."""
    words = ["sweep", arguments.sweep, "--folder", str(folder), "--store", str(arguments.store)]
    words += ["--cache", str(arguments.cache)] if arguments.cache else []
    name = job_name(dataclasses.replace(sweep.base, name=sweep.name), None)
    check_required(arguments, LAUNCHERS[arguments.on])
    handover = CLUSTERS[arguments.on].hand_over(
        arguments, name, words, {"--folder": str(folder), "--store": str(arguments.store)}
    )
    if arguments.dry_run:
        print(handover.text, end="")
        return 0
    hand_over(handover)
    for line in handover.next:
        print(f"lm sweep: {line}")
    return 0


def _work(arguments: argparse.Namespace, sweep: Sweep, folder: Path) -> int:
    from lm.sweep.run import join, run_sweep
    from lm.sweep.worker import WorkerStopped

    try:
        if arguments.join is not None:
            join(sweep, folder, arguments.store, arguments.join)
            return 0
        failed = run_sweep(
            sweep, arguments.sweep, folder, arguments.workers, arguments.retry_failed, arguments.cache, arguments.store
        )
    except WorkerStopped as stopped:
        if arguments.join is None:
            print(f"lm: stopped and saved. To go on: {command_to_go_on(arguments)}", file=sys.stderr)
        return stopped.exit_code
    for line in failed:
        print(f"failed: {line}")
    print(f"to compare: lm compare {folder}")
    return EXIT_FAILED if failed else 0


def command_to_go_on(arguments: argparse.Namespace) -> str:
    """The command that resumes this sweep."""
    given = given_flags(arguments, {"folder": None, "workers": 1, "store": STORE, "cache": None})
    return shlex.join(["lm", "sweep", arguments.sweep, *given])
