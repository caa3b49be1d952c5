"""List runs, remove some or their older checkpoints, or send their numbers on.

  lm runs                          the runs in runs/: state, metrics, size, when
  lm runs sweeps/pretraining
  lm runs rm runs/old              the whole folder, after a question
  lm runs rm quickstart --checkpoints
  lm runs send quickstart --sinks wandb,mlflow

--checkpoints removes what neither a resume nor a later stage reads: all but the
last checkpoint of a finished stage, and all but the newest two of the others.
send gives a sink all the lines of metrics and evals that it lacks."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lm.cli.arguments import find_runs
from lm.experiment import UserError, nearest

TAKES_OVERRIDES = False
REMOVE, SEND = "rm", "send"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm runs [FOLDER] [--json]\n       lm runs rm RUN... [--checkpoints] [--yes]\n       lm runs send RUN... --sinks NAME,..."
    parser.add_argument(
        "words", metavar="FOLDER", nargs="*", help="folder of the runs (runs); or `rm` or `send`, followed by runs"
    )
    parser.add_argument("--checkpoints", action="store_true", help="with rm: only older checkpoints")
    parser.add_argument("--yes", action="store_true", help="with rm: without a question")
    parser.add_argument("--sinks", metavar="NAME,...", help="with send: tensorboard, wandb, trackio, mlflow")
    parser.add_argument("--json", action="store_true", help="list as one JSON array")


def call(arguments: argparse.Namespace) -> int:
    if arguments.words[:1] == [REMOVE]:
        return remove_runs(arguments)
    if arguments.words[:1] == [SEND]:
        return send_runs(arguments)
    if len(arguments.words) > 1:
        raise UserError(
            f"lm runs lists one folder; {arguments.words[1]!r} is a second (to remove runs: lm runs rm RUN...)"
        )
    if arguments.checkpoints or arguments.yes:
        raise UserError("--checkpoints and --yes are for lm runs rm RUN...")
    if arguments.sinks is not None:
        raise UserError("--sinks is for lm runs send RUN...")

    from lm.train.run_list import list_runs

    folder = Path(arguments.words[0] if arguments.words else "runs")
    found = list_runs(folder)
    if arguments.json:
        print(json.dumps([asdict(one) | {"folder": str(one.folder)} for one in found], indent=1))
        return 0
    if not found:
        print(f"no run in {folder}: `lm run EXPERIMENT` makes one")
        return 0
    rows = [("run", "state", "last metrics", "size", "last written")]
    for one in found:
        name = str(one.folder.relative_to(folder)) if one.folder != folder else str(folder)
        rows.append(
            (
                name,
                one.state,
                one.metrics,
                megabytes(one.size),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(one.written)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                cell.rjust(width) if i == 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    total, saved = sum(one.size for one in found), sum(one.checkpoints for one in found)
    print(f"\n{len(found)} runs, {megabytes(total)}, of which checkpoints {megabytes(saved)}")
    return 0


def megabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def remove_runs(arguments: argparse.Namespace) -> int:
    """Remove runs or their older checkpoints; nothing of a run that a process uses."""
    from lm.train.run_list import is_running, list_runs, older_checkpoints, readers_of, remove, run_state

    names = arguments.words[1:]
    if not names:
        raise UserError("lm runs rm RUN...: name the runs to remove")
    runs = find_runs(names)
    for run in runs:
        if is_running(run):
            raise UserError(f"{run} is in use by a process: stop it first")
    chosen = {run: older_checkpoints(run) if arguments.checkpoints else [run] for run in runs}
    for run, paths in chosen.items():
        size = sum(path.lstat().st_size for one in paths for path in one.rglob("*") if path.is_file())
        what = f"{len(paths)} checkpoints" if arguments.checkpoints else f"all of it: {run_state(run).state}"
        print(f"{run}: {what}, {megabytes(size)}")
        readers = [] if arguments.checkpoints else readers_of(run, (one.folder for one in list_runs(run.parent)))
        for reader in readers:
            print(f"  its models are named in {reader}/experiment.json")
    if not any(chosen.values()):
        print("nothing to remove")
        return 0
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was removed: without a terminal to answer on, say --yes")
        if input("remove? [y/N] ").strip().casefold() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    for run, paths in chosen.items():
        remove(run, paths)
    print("removed")
    return 0


def send_runs(arguments: argparse.Namespace) -> int:
    """Send what sinks lack of runs."""
    from lm.train.run_folder import RunFolder
    from lm.train.sinks.feed import SINKS, send_run

    names = [name for name in (arguments.sinks or "").split(",") if name]
    unknown = [name for name in names if name not in SINKS]
    if unknown or not names or not arguments.words[1:]:
        hint = nearest(unknown[0], SINKS) if unknown else ""
        raise UserError(f"lm runs send RUN... --sinks NAME,...: there are {', '.join(SINKS)}{hint}")
    for run in find_runs(arguments.words[1:]):
        for name, count in send_run(RunFolder(run), names).items():
            print(f"{run}: {count:,} lines to {name}")
    return 0
