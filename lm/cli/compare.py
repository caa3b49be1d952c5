"""Compare runs, or the trials of a sweep: over seeds, with a baseline.

  lm compare sweeps/pretraining
  lm compare runs/a0 runs/a1 runs/b0 runs/b1
  lm compare sweeps/pretraining --baseline without=baseline --csv rows.csv
  lm compare runs/* --baseline a0

Runs that differ in their seed only are one group; a run that is named twice,
or copied, counts once. Every group is compared with the baseline (the sweep's
own, else the first finished one, or --baseline) within each seed: the mean
difference, its 95 % interval (Student's t, from six seeds on a bootstrap), and
a p-value corrected for all comparisons (Holm). Where no difference
is found, the smallest detectable one is shown, unless all seeds are equal.
The page compare.html has curves, importance and the origin of every number."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lm.cli.arguments import ending_in, find_run, page_path, without_pages
from lm.experiment import UserError

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN | SWEEP", nargs="+", help="folders of runs, or of sweeps; or their names")
    parser.add_argument(
        "--baseline",
        metavar="NAME | NAME=VALUE",
        action="append",
        default=[],
        help="the group to compare with: its name in the table, one of its runs, or settings of it",
    )
    parser.add_argument("--eval", metavar="NAME", action="append", default=[], help="only this eval")
    parser.add_argument("--page", metavar="FILE", type=page_path, help="the page; else compare.html in the sweep")
    parser.add_argument("--csv", metavar="FILE", type=ending_in(".csv"), help="a row for every run")
    parser.add_argument("--parquet", metavar="FILE", type=ending_in(".parquet"), help="a row for every run")


def call(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lm.sweep.compare import compare
    from lm.sweep.results import read_result, read_sweep
    from lm.sweep.table import show, write
    from lm.web.compare import write_comparison

    results, sweeps = [], []
    for name in without_pages(arguments.runs):
        folder = sweep_folder(name)
        sweeps += [folder] if folder else []
        results += read_sweep(folder) if folder else [read_result(one_run(name))]
    wanted, why = baseline(arguments.baseline, sweeps)
    comparison = compare(results, wanted, arguments.eval, why)
    show(comparison, Console())
    for path in filter(None, (arguments.csv, arguments.parquet)):
        print(write(comparison, path))
    print(write_comparison(comparison, arguments.page or default_page([result.folder for result in results], sweeps)))
    return 0


def sweep_folder(name: str) -> Path | None:
    """Find the folder of a sweep, given as a path or as a name in sweeps/; None if it is not one."""
    return next((path for path in (Path(name), Path("sweeps") / name) if (path / "sweep.json").is_file()), None)


def one_run(name: str) -> Path:
    """Find the folder of a run. Raises UserError, listing runs and sweeps, if there is none."""
    try:
        return find_run(name)
    except UserError as error:
        known = ", ".join(sorted(path.parent.name for path in Path("sweeps").glob("*/sweep.json")))
        raise UserError(f"{error}; sweeps/ here has: {known or 'nothing'}") from None


def baseline(given: list[str], sweeps: list[Path]) -> tuple[dict[str, str] | str | None, str]:
    """(baseline from the option, else from the sweep; its origin). Raises UserError for several group names."""
    if len(given) > 1 and (names := [text for text in given if "=" not in text]):
        raise UserError(f"--baseline {names[0]!r} beside others; it should be one name, or several NAME=VALUE")
    if given:
        settings = dict(text.split("=", 1) for text in given if "=" in text)
        return settings or given[0], "asked for with --baseline"
    if not sweeps:
        return None, ""
    from lm.sweep.results import read_description

    named = read_description(sweeps[0]).get("baseline")
    return named, f"{sweeps[0]} names it" if named else "the first value of every axis"


def default_page(runs: list[Path], sweeps: list[Path]) -> Path:
    """Default path of compare.html: in the sweep, or beside the runs."""
    if sweeps:
        return sweeps[0] / "compare.html"
    return Path(os.path.relpath(os.path.commonpath([folder.resolve().parent for folder in runs]))) / "compare.html"
