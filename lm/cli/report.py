"""Write report.html of a run, or frontier.html of several seeds.

A page is one self-contained file. A run that is not finished has
a report too. frontier.html and its .png show gold reward against KL over the
seeds of one experiment. Where a reward model's score rises while the judge's
reward falls, a warning is printed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lm.cli.arguments import RUN_HELP, find_runs, page_path, without_pages
from lm.experiment import UserError

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="+", help=f"{RUN_HELP}; several: seeds of one experiment")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=page_path,
        help="page over several runs; else frontier.html beside them (with a .png)",
    )
    parser.add_argument(
        "--rollouts",
        metavar="STEPS",
        type=_steps,
        help="steps of which the pages in rollouts/ show everything that was sampled: 12, or 10-20; "
        "else as many as fit, evenly spread",
    )


def _steps(text: str) -> range:
    """FIRST-LAST, or one step, counted from 1."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (first, last)):
        raise argparse.ArgumentTypeError(f"{text!r} should be a step or FIRST-LAST, for instance 12 or 10-20")
    if not 1 <= int(first) <= int(last):
        raise argparse.ArgumentTypeError(f"{text!r}: steps are counted from 1, the first before the last")
    return range(int(first), int(last) + 1)


def call(arguments: argparse.Namespace) -> int:
    run_dirs = find_runs(without_pages(arguments.run))
    if arguments.out is not None and len(run_dirs) == 1:
        raise UserError("--out is for the page over several runs; the report of one is report.html in its folder")

    if arguments.rollouts is not None and len(run_dirs) > 1:
        raise UserError("--rollouts is for the report of one run; name one RUN")

    from lm.train.run_files import read_run
    from lm.web.frontier import write_frontier
    from lm.web.report import write_report
    from lm.web.watch import warnings

    if len(run_dirs) == 1:
        written: tuple[Path, ...] = (write_report(run_dirs[0], arguments.rollouts),)
    else:
        written = write_frontier(run_dirs, arguments.out or beside(run_dirs))
    for folder in run_dirs:
        for stage, told in warnings(read_run(folder)):
            print(f"{folder.name}, {stage}: {told}")
    print(*written, sep="\n")
    return 0


def beside(run_dirs: list[Path]) -> Path:
    """Default path of frontier.html: in the folder that contains all runs."""
    common = Path(os.path.commonpath([folder.resolve().parent for folder in run_dirs]))
    here = Path.cwd()
    return (common.relative_to(here) if common.is_relative_to(here) else common) / "frontier.html"
