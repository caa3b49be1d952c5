"""Run a sweep: every trial that its axes make of the base, each an `lm run`.

  lm sweep ablations.qk_norm --dry-run
  lm sweep ablations.qk_norm --workers 2
  lm compare sweeps/qk_norm

Any number of workers work together, here and on other hosts that share the
sweep's folder: start the same command there. One that dies is replaced, and its
trial goes on from the newest checkpoint. The same command again continues; with
more seeds or values on the axes it adds what is missing. Stages that trials
have in common are trained once.

On a cluster, `--on` hands --workers jobs over, each of which is one worker:
slurm by sbatch, gke by kubectl. The sweep's folder must be on a file system
that all of them share and on which files can be locked (NFS, Lustre, a volume
claim; no bucket)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm.cli.arguments import EXIT_INTERRUPT, add_cache, at_least
from lm.experiment import UserError
from lm.sweep.sweep import STORE, Sweep, folder_of, load

TAKES_OVERRIDES = False
SWEEP_HELP = "a name in experiments/ (ablations.qk_norm), or the path of a .py file that defines `sweep`"
EXIT_FAILED = 1  # some trial did


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP_HELP)
    parser.add_argument(
        "--workers", metavar="N", type=at_least(1), default=1, help="trials at the same time (%(default)s)"
    )
    parser.add_argument("--folder", metavar="DIR", type=Path, help="folder of the sweep; else sweeps/NAME")
    parser.add_argument(
        "--store",
        metavar="DIR",
        type=Path,
        default=STORE,
        help="of stages that trials share, also with other sweeps (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials and what they cost, and do nothing")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="with --dry-run: cost in hours of these TPUs")
    parser.add_argument("--retry-failed", action="store_true", help="run the trials again that failed")
    parser.add_argument("--join", metavar="NAME", help=argparse.SUPPRESS)  # one of several workers, started by this one
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    from lm.data.cache import cache_at
    from lm.sweep.trials import check_sweep

    sweep = load(arguments.sweep)
    check_sweep(sweep)
    folder = arguments.folder or folder_of(sweep)
    if arguments.dry_run:
        from lm.sweep.folder import SweepFolder
        from lm.sweep.show import dry_run

        print(dry_run(sweep, SweepFolder(folder, arguments.store), arguments.topology))
        return 0
    if arguments.topology:
        raise UserError(
            "--topology is for --dry-run: where a trial runs is its experiment's mesh and this machine's matter"
        )
    with cache_at(arguments.cache):
        return _work(arguments, sweep, folder)


def _work(arguments: argparse.Namespace, sweep: Sweep, folder: Path) -> int:
    from lm.sweep.run import join, run_sweep
    from lm.sweep.worker import Stopped

    try:
        if arguments.join is not None:
            join(sweep, folder, arguments.store, arguments.join)
            return 0
        failed = run_sweep(
            sweep, arguments.sweep, folder, arguments.workers, arguments.retry_failed, arguments.cache, arguments.store
        )
    except Stopped:
        if arguments.join is None:
            print(f"lm: stopped and saved. To go on: lm sweep {arguments.sweep}", file=sys.stderr)
        return EXIT_INTERRUPT
    for line in failed:
        print(f"failed: {line}")
    print(f"to compare: lm compare {folder}")
    return EXIT_FAILED if failed else 0
