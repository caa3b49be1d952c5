"""Test a claim of a paper: run its experiments, and write the verdict.

  lm reproduce                          list the claims and their verdicts
  lm reproduce NAME --workers 2         run (or resume) it and write the verdict
  lm reproduce NAME --quick             a smoke test of a minute
  lm reproduce --page docs/papers.html  write the page of all stored results

A claim is experiments/papers/NAME.py, and NAME.md states it, what is
scaled down, and how it would be refuted. The verdict goes into NAME.md and
results/NAME.json beside it; the runs stay in sweeps/NAME-…"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lm.cli.arguments import add_cache, at_least, folder_path, given_flags, page_path
from lm.experiment import UserError
from lm.files import experiments_folder

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of a claim; without it all are listed")
    parser.add_argument("--quick", action="store_true", help="a small smoke test without a verdict; writes no result")
    parser.add_argument(
        "--workers", metavar="N", type=at_least(1, 1000), default=1, help="runs at the same time (%(default)s)"
    )
    parser.add_argument(
        "--folder", metavar="DIR", type=folder_path, help="prefix of the folders of the runs; else sweeps/NAME"
    )
    parser.add_argument("--page", metavar="FILE", type=page_path, help="write the page of all stored results")
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    if arguments.page is not None:
        from lm.web.papers import write_papers

        print(write_papers(experiments_folder("papers"), arguments.page))
        return 0
    if arguments.name is None:
        print(listing())
        return 0

    from lm.papers.paper import load
    from lm.papers.reproduce import markdown, reproduce, write
    from lm.stored import cache_at
    from lm.sweep.worker import WorkerStopped

    paper = load(arguments.name)
    name = Path(arguments.name).stem if arguments.name.endswith(".py") else arguments.name.removeprefix("papers.")
    folder = arguments.folder or Path("sweeps") / name
    try:
        with cache_at(arguments.cache):
            outcome = reproduce(name, paper, folder, arguments.quick, arguments.workers, arguments.cache)
    except WorkerStopped as stopped:
        print(f"lm: stopped and saved. To go on: {command_to_go_on(arguments)}", file=sys.stderr)
        return stopped.exit_code
    print(markdown(outcome))
    if not arguments.quick:
        home = Path(arguments.name).parent if arguments.name.endswith(".py") else experiments_folder("papers")
        print(*write(outcome, home), sep="\n")
    return 0


def command_to_go_on(arguments: argparse.Namespace) -> str:
    """The command that resumes this reproduction."""
    given = given_flags(arguments, {"quick": False, "workers": 1, "folder": None, "cache": None})
    return shlex.join(["lm", "reproduce", arguments.name, *given])


def listing() -> str:
    """List the claims with their verdicts."""
    from lm.papers.kept import claims

    home = experiments_folder("papers")
    found = claims(home)
    if not found:
        raise UserError(f"there are no claims in {home}: start in the folder of a clone, or name a file")
    width = max(len(one.name) for one in found)
    return "\n".join(f"{one.name:<{width}}  {one.verdict:<13}  {one.title}" for one in found)
