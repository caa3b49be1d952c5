"""Train a run's experiment again, and check that every number is bitwise equal.

  lm rerun runs/quickstart

Trains the run's experiment.json again in runs/quickstart.rerun, after listing
what has changed: versions, commit, device, data. On the same kind of device,
with the same code and versions, every loss and eval result must be equal; exits
with 1 and names the first that is not."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from lm.cli.arguments import (
    EXIT_INTERRUPT,
    RUN_HELP,
    add_cache,
    check_stage,
    find_run,
    folder_path,
    given_flags,
)
from lm.experiment import UserError

TAKES_OVERRIDES = False
EXIT_DIFFERS = 1
LONGEST = 60


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--out", metavar="DIR", type=folder_path, help="folder of the new run; else RUN.rerun")
    parser.add_argument("--until", metavar="STAGE", help="only up to and with this stage")
    parser.add_argument("--same", action="store_true", help="refuse to run if anything has changed")
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    run_dir = find_run(arguments.run)

    from lm.files import load
    from lm.stored import cache_at
    from lm.train.fingerprints import fingerprints
    from lm.train.loop import Interrupted
    from lm.train.rerun import changed_conditions, first_difference
    from lm.train.run_folder import RunFolder
    from lm.train.stages import run

    experiment = load(str(run_dir / "experiment.json"))
    names = [stage.name for stage in experiment.stages]
    check_stage(arguments.until, names, str(run_dir))
    names = names[: names.index(arguments.until or names[-1]) + 1]
    unfinished = [name for name in names if not RunFolder(run_dir).finished(name)]
    if unfinished:
        raise UserError(f"{run_dir} has not finished stage {unfinished[0]}: run it to its end, or name --until STAGE")
    out = arguments.out or run_dir.with_name(f"{run_dir.name}.rerun")
    with cache_at(arguments.cache):
        changes = changed_conditions(run_dir, fingerprints(experiment))
        for name, then, now in changes:
            print(f"changed: {name}: {_short(then)} → {_short(now)}", flush=True)
        if changes and arguments.same:
            raise UserError(f"{len(changes)} conditions have changed (listed above); without --same it runs anyway")
        try:
            run(experiment, out, until=names[-1])
        except Interrupted as stopped:
            print(f"lm: {stopped}. To go on: {command_to_go_on(arguments)}", file=sys.stderr)
            return EXIT_INTERRUPT
    found = first_difference(run_dir, out, names)
    if found:
        print(f"different: {found}")
        return EXIT_DIFFERS
    print(f"the same to the bit: every number of {', '.join(names)}")
    return 0


def on_interrupt(arguments: argparse.Namespace) -> str:
    """What a rerun has kept that a second Ctrl-C stopped at once, or a signal before training."""
    return f"Checkpoints, and data in the cache, are kept. To go on: {command_to_go_on(arguments)}"


def command_to_go_on(arguments: argparse.Namespace) -> str:
    """The command that resumes this rerun."""
    given = given_flags(arguments, {"out": None, "until": None, "same": False, "cache": None})
    return shlex.join(["lm", "rerun", arguments.run, *given])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
