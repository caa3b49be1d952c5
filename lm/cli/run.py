"""Train an experiment, stage after stage, into runs/NAME.

The same command again goes on where a run was stopped, and skips stages that
are finished. Any knob of the experiment can be changed by its dotted name:

  lm run quickstart --sft.steps 200 --model.num_layers 4 --name smaller

`lm config EXPERIMENT --help` lists them all."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lm.cli.arguments import EXIT_INTERRUPT, EXPERIMENT_HELP, add_cache, check_stage, resolve

TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm run EXPERIMENT [options] [--a.b.c VALUE ...]"
    parser.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="folder of the run; else runs/NAME")
    parser.add_argument("--fresh", action="store_true", help="set an earlier run in the folder aside, and begin anew")
    parser.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="trace these steps of every stage into stages/NAME/profile (10:13 has three)",
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    experiment = resolve(arguments.experiment, arguments.overrides)
    check_stage(arguments.until, (stage.name for stage in experiment.stages), arguments.experiment)
    run_dir = arguments.run_dir or Path("runs") / experiment.name

    from lm.data.cache import cache_at
    from lm.train.loop import Interrupted
    from lm.train.profile import parse_steps
    from lm.train.stages import run

    profile = parse_steps(arguments.profile) if arguments.profile else None
    try:
        with cache_at(arguments.cache):
            run(
                experiment,
                run_dir,
                fresh=arguments.fresh,
                until=arguments.until,
                profile=profile,
                after_stage=report,
            )
    except Interrupted as stopped:
        print(f"lm: {stopped}. To go on: {command_to_go_on(arguments)}", file=sys.stderr)
        return EXIT_INTERRUPT
    if report(run_dir):
        print(f"report: {run_dir / 'report.html'}")
    return 0


def report(run_dir: Path) -> bool:
    """Write the report of what there is so far, in one process of many; whether it was this one."""
    import jax

    from lm.web.report import write_report

    first = jax.process_index() == 0
    if first:
        write_report(run_dir)
    return first


def command_to_go_on(arguments: argparse.Namespace) -> str:
    """The same command, less `--fresh`, which would begin anew."""
    flags = {
        f"--{name.replace('_', '-')}": getattr(arguments, name) for name in ("run_dir", "until", "profile", "cache")
    }
    given = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
    return shlex.join(["lm", "run", arguments.experiment, *given, *arguments.overrides])
