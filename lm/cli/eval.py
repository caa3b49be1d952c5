"""Take the held-out numbers of a run again, from a checkpoint.

Says where they differ from the numbers that the run itself wrote down."""

from __future__ import annotations

import argparse
import math
from typing import Any

from lm.cli.arguments import RUN_HELP, add_cache, find_run, find_stage

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage; else the last one trained")
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    run_dir = find_run(arguments.run)
    stage = find_stage(run_dir, arguments.stage)

    from lm.data.cache import cache_at
    from lm.train.stages import evaluate_run
    from lm.web.run_files import read_run

    own = next(files.evals for files in read_run(run_dir).stages if files.name == stage)
    print(f"{run_dir}, after stage {stage}\n")
    with cache_at(arguments.cache):
        print(table(evaluate_run(run_dir, stage), own))
    return 0


def table(lines: list[dict[str, Any]], own: list[dict[str, Any]]) -> str:
    """The lines (as in eval.jsonl) beside those that the run itself wrote at the same step.

    The last row says whether they agree.
    """
    recorded = {(line["step"], line["eval"]): line for line in own}
    rows = [("eval", "metric", "count", "now", "in the run", "difference")]
    differ = []
    for line in lines:
        value, old = line[line["metric"]], recorded.get((line["step"], line["eval"]))
        then = old[line["metric"]] if old else None
        same = then is not None and math.isclose(value, then, rel_tol=1e-6, abs_tol=1e-9)
        change = "" if then is None else "same" if same else f"{value - then:+.3g}"
        if then is not None and not same:
            differ.append(line["eval"])
        shown = "–" if then is None else f"{then:.4f}"
        rows.append((line["eval"], line["metric"], str(line["count"]), f"{value:.4f}", shown, change))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [_row(row, widths) for row in rows]
    return "\n".join([*text, "", _verdict(lines, recorded, differ)])


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    words = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(words).rstrip()


def _verdict(lines: list[dict[str, Any]], recorded: dict[tuple[int, str], dict[str, Any]], differ: list[str]) -> str:
    if differ:
        return f"differs from the run's own: {', '.join(differ)}"
    if not any((line["step"], line["eval"]) in recorded for line in lines):
        return "the run took no numbers of its own at this step"
    return "the same as the run's own"
