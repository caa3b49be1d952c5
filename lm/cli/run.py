"""Train an experiment, stage after stage, into runs/NAME.

The same command again resumes the run, and skips stages that
are finished. Any knob of the experiment can be overridden by its dotted name:

  lm run quickstart --sft.steps 200 --model.num_layers 4 --name smaller

`lm config EXPERIMENT --help` lists them all.

On many hosts run the same command on each, with the run's folder on a file
system that they share. On TPU VMs, GKE and under srun or mpirun the processes
find each other; elsewhere give the address of process 0, the number of
processes, and the number of this one: --coordinator, --num-processes,
--process-id, or the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID.
SIGTERM to one of them saves and stops all. Exit codes: 2 an error of the user,
75 a step that timed out (--watchdog), 130 stopped and saved."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lm.cli.arguments import (
    EXIT_INTERRUPT,
    EXPERIMENT_HELP,
    add_cache,
    at_least,
    check_stage,
    folder_path,
    given_flags,
    number,
    resolve,
)

TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm run EXPERIMENT [options] [--a.b.c VALUE ...]"
    parser.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    parser.add_argument("--run-dir", metavar="DIR", type=folder_path, help="folder of the run; else runs/NAME")
    parser.add_argument("--fresh", action="store_true", help="move an earlier run of the folder aside and start over")
    parser.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="trace these steps of every stage into stages/NAME/profile (10:13 has three)",
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume even with other data, tokenizer, collected files or versions than the run began with",
    )
    parser.add_argument(
        "--no-report", action="store_true", help="do not write report.html (`lm report` can), which saves seconds"
    )
    parser.add_argument(
        "--callback",
        metavar="FILE:FUNCTION",
        action="append",
        default=[],
        help="call your own function with (stage, kind, line) for every line written; can be repeated",
    )
    add_cache(parser)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="multi-process: address of process 0")
    parser.add_argument("--num-processes", metavar="N", type=at_least(1), help="multi-process: number of processes")
    parser.add_argument(
        "--process-id", metavar="I", type=at_least(0), help="multi-process: number of this process, from 0"
    )
    parser.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=number(0.1, 86_400),
        default=300.0,
        help="multi-process: how long to wait for the others at the start (%(default)g)",
    )
    parser.add_argument(
        "--watchdog",
        metavar="SECONDS",
        type=number(0, 86_400),
        help="a step that takes longer shows all stacks and ends the process with 75, so that a launcher starts it "
        "again; compilation and evaluation have four times as long; 0: never (900 with several processes, 0 with one)",
    )


def call(arguments: argparse.Namespace) -> int:
    experiment = resolve(arguments.experiment, arguments.overrides)
    check_stage(arguments.until, (stage.name for stage in experiment.stages), arguments.experiment)
    run_dir = arguments.run_dir or Path("runs") / experiment.name

    import jax

    from lm.parallel.distributed import find_process_group, gather, is_main_process, joined
    from lm.stored import cache_at
    from lm.train.loop import Interrupted
    from lm.train.profile import parse_steps
    from lm.train.stages import run
    from lm.train.watchdog import DEFAULT_SECONDS

    profile = parse_steps(arguments.profile) if arguments.profile is not None else None
    where = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    job = find_process_group(*where, arguments.join_timeout)
    with joined(job), cache_at(arguments.cache):
        many = jax.process_count() > 1
        watchdog = (DEFAULT_SECONDS if many else 0.0) if arguments.watchdog is None else arguments.watchdog
        try:
            run(
                experiment,
                run_dir,
                fresh=arguments.fresh,
                accept=arguments.accept_changes,
                until=arguments.until,
                profile=profile,
                watchdog=watchdog or None,
                after_stage=(lambda run_dir: None) if arguments.no_report else report,
                callbacks=arguments.callback,
            )
        except Interrupted as stopped:
            if is_main_process():
                print(f"lm: {stopped}. To go on: {command_to_go_on(arguments)}", file=sys.stderr)
            return EXIT_INTERRUPT
        if arguments.no_report:
            return 0
        from lm.train.run_files import read_run
        from lm.web.watch import warnings

        if report(run_dir):
            print(f"report: {run_dir / 'report.html'}")
            for stage, told in warnings(read_run(run_dir)):
                print(f"{stage}: {told}")
        gather(None)  # the others wait until the report is written
        return 0


def report(run_dir: Path) -> bool:
    """Write the report so far, in the main process; returns whether this is the main process."""
    from lm.parallel.distributed import is_main_process
    from lm.web.report import write_report

    if is_main_process():
        write_report(run_dir)
    return is_main_process()


def on_interrupt(arguments: argparse.Namespace) -> str:
    """What a run has kept that a second Ctrl-C stopped at once, or a signal before training."""
    return f"Checkpoints, and data in the cache, are kept. To go on: {command_to_go_on(arguments)}"


def command_to_go_on(arguments: argparse.Namespace) -> str:
    """The command that resumes this run: the same without `--fresh`."""
    names = ("run_dir", "until", "profile", "cache", "coordinator", "num_processes", "process_id", "watchdog")
    given = given_flags(arguments, dict.fromkeys(names) | {"no_report": False, "callback": []})
    return shlex.join(["lm", "run", arguments.experiment, *given, *arguments.overrides])
