"""Write report.html, the story of a run.

One file that opens anywhere, offline; a run that is not finished has one too."""

from __future__ import annotations

import argparse

from lm.cli.arguments import RUN_HELP, find_run

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)


def call(arguments: argparse.Namespace) -> int:
    run_dir = find_run(arguments.run)

    from lm.web.report import write_report

    print(write_report(run_dir))
    return 0
