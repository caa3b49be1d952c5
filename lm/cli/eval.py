"""Evaluate a run on its held-out data again, or score pairs of answers.

Evaluates a checkpoint and reports differences from the numbers that the run
recorded. With --pairs, accuracy and calibration of the run's reward model (or
of a language model's implicit reward) on the preference pairs of a file:

  lm eval rlhf --stage ppo
  lm eval seed0 seed1 --pairs FILE --heldout 0.15 --page pairs.html

A published model is evaluated on your file, or by the evals of an experiment;
with --adapter, adapters are compared, beside each other:

  lm eval FOLDER --evals.heldout.source.path FILE --evals.heldout.metric reward
  lm eval EXPERIMENT --init FOLDER --adapter ONE --adapter OTHER

Tasks of lm-evaluation-harness (extra `bench`), or your own in its YAML form:

  lm eval RUN --tasks arc_easy,hellaswag --limit 200
  lm eval FOLDER --tasks my_tasks/ --fewshot 5
  lm eval RUN --tasks arc_easy --contamination      is it in the training data?"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.cli.arguments import (
    MODEL_HELP,
    add_cache,
    at_least,
    find_run,
    find_runs,
    find_stage,
    number,
    page_path,
    resolve_model,
    weights_of,
)
from lm.experiment import UserError
from lm.extras import install_command

if TYPE_CHECKING:
    from lm.evals.harness import TaskResult
    from lm.evals.preferences import BootstrapEstimate
    from lm.train.judging import PairScores

TAKES_OVERRIDES = True
TASK_FLAGS = ("limit", "fewshot", "chat", "samples", "contamination")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm eval RUN|EXPERIMENT|FOLDER [options] [--a.b.c VALUE ...]"
    parser.add_argument(
        "run", metavar="RUN", nargs="+", help=f"{MODEL_HELP}; with --pairs several runs are an ensemble"
    )
    parser.add_argument("--init", metavar="FOLDER", help="open weights to evaluate; RUN is then an experiment")
    parser.add_argument(
        "--adapter", metavar="FOLDER", action="append", default=[],
        help="add a PEFT adapter to the model; can be repeated, to compare several",
    )  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage; else the last one trained")
    parser.add_argument("--pairs", metavar="FILE", help="rows of prompt, chosen, rejected to score")
    parser.add_argument(
        "--heldout",
        metavar="X",
        type=number(0, 1),
        help="with --pairs: only the rows that a source with this holdout holds out",
    )
    parser.add_argument("--json", action="store_true", help="with --pairs or --tasks: one object")
    parser.add_argument("--page", metavar="FILE", type=page_path, help="with --pairs: a page with the calibration")
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness, YAML files or folders of your own, or core:FOLDER",
    )
    parser.add_argument("--limit", metavar="N", type=at_least(1), help="with --tasks: the first N items of each task")
    parser.add_argument(
        "--fewshot",
        metavar="N",
        type=at_least(0),
        help="with --tasks: examples before each item; else as the task says",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="with --tasks: ask through the chat template; else where the model has been trained on conversations",
    )
    parser.add_argument(
        "--no-chat", dest="chat", action="store_false", default=None, help="with --tasks: without the chat template"
    )
    parser.add_argument("--samples", metavar="FILE", type=Path, help="with --tasks: write what was asked and answered")
    parser.add_argument(
        "--contamination",
        metavar="WORDS",
        type=at_least(3, 1000),
        nargs="?",
        const=13,
        help="with --tasks: which items share n-grams of so many words (%(const)s) with the run's training data, and the score of the "
        "others",
    )
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    if arguments.tasks is not None:
        return benchmarks(arguments)
    given = [f"--{name}" for name in TASK_FLAGS if getattr(arguments, name) is not None]
    if given:
        raise UserError(f"{given[0]} is for --tasks NAME,...")
    if arguments.init is not None or weights_of(arguments.run[0]) is not None:
        return evaluate_weights(arguments)
    runs = find_runs(arguments.run)
    if arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]} is for lm eval FOLDER and lm eval EXPERIMENT --init FOLDER; the evals of {runs[0]} are those "
            "of its experiment"
        )
    if arguments.pairs is not None:
        if arguments.adapter:
            raise UserError("--pairs scores runs as they are: it takes no --adapter")
        return pairs(runs, arguments)
    if len(runs) > 1 or arguments.heldout is not None or arguments.json or arguments.page:
        raise UserError("several runs, --heldout, --json and --page are for --pairs FILE")
    run_dir = runs[0]
    stage = find_stage(run_dir, arguments.stage)

    from lm.stored import cache_at
    from lm.train.run_files import read_run
    from lm.train.stages import evaluate_run

    own = next(files.evals for files in read_run(run_dir).stages if files.name == stage)

    print(f"{run_dir}, after stage {stage}\n", flush=True)
    with cache_at(arguments.cache):
        measured = evaluate_run(run_dir, stage, tell, arguments.adapter)
    print(comparison(measured, own) if arguments.adapter else table(measured[""], own))
    return 0


def benchmarks(arguments: argparse.Namespace) -> int:
    """Measure tasks on one model, and print a table or JSON."""
    others = ("init", "pairs", "heldout", "page")
    if len(arguments.run) > 1 or len(arguments.adapter) > 1 or any(getattr(arguments, x) is not None for x in others):
        raise UserError(
            "--tasks measures one model, with at most one --adapter, without --init, --pairs, --heldout and --page"
        )
    if arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]}: --tasks measures a model as it is, and takes no field of an experiment"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs lm-evaluation-harness: {install_command('bench')}")
    run_dir = weights_of(arguments.run[0]) or find_run(arguments.run[0])

    from lm.stored import cache_at, write_atomic
    from lm.train.benchmarks import TaskSettings, run_benchmarks

    names = tuple(name for name in arguments.tasks.split(",") if name)
    settings = TaskSettings(names, arguments.limit, arguments.fewshot, arguments.chat, arguments.contamination)
    adapter = next(iter(arguments.adapter), None)
    with cache_at(arguments.cache):
        model, results, samples = run_benchmarks(run_dir, arguments.stage, adapter, settings, tell)
    if arguments.samples:
        lines = [json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in samples]
        write_atomic(arguments.samples, "".join(lines).encode())
    if arguments.json:
        print(json.dumps({"model": model, "results": [dataclasses.asdict(one) for one in results]}, indent=1))
        return 0
    rows = [("task", "metric", "shots", "items", "value", "± 1 s.e.")]
    for one in results:
        error = "" if one.stderr is None else f"{one.stderr:.4f}"
        shots = "" if one.fewshot is None else str(one.fewshot)
        rows.append((one.task, one.metric, shots, str(one.count), f"{one.value:.4f}", error))
    print(f"{model}\n\n{aligned(rows)}")
    print("\n".join(contamination_lines(results)), end="")
    return 0


def on_interrupt(arguments: argparse.Namespace) -> str:
    """What an interrupted measurement of tasks has kept; "" of other evaluations, which keep nothing."""
    return "" if arguments.tasks is None else "The answers so far are in the cache: the same command goes on after them"


def contamination_lines(results: Sequence[TaskResult]) -> Iterator[str]:
    """What the training data has of each task's items, the metrics of the others, and examples."""
    checked = [(one, one.contamination) for one in results if one.contamination is not None]
    for task, group in itertools.groupby(checked, key=lambda pair: pair[0].task):
        members = list(group)
        yield f"\n{task}: {members[0][1]['text']}"
        for one, found in members:
            clean, error = found["clean"], found["clean"]["stderr"]
            if clean["value"] is not None:
                margin = "" if error is None else f" ± {error:.4f}"
                yield f"  {one.metric} of the {clean['count']:,} others: {clean['value']:.4f}{margin}"
        yield from (f"  {line}" for line in members[0][1]["examples"])
        yield ""


def tell(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def evaluate_weights(arguments: argparse.Namespace) -> int:
    """Measure open weights by the evals of an experiment."""
    others = (arguments.stage, arguments.pairs, arguments.heldout, arguments.page)
    if len(arguments.run) > 1 or arguments.json or any(other is not None for other in others):
        raise UserError(
            "a published model is evaluated alone, or by one experiment, without --stage, --pairs, --heldout, --json and --page"
        )
    named = [] if arguments.init is None else ["--init", arguments.init]
    experiment = resolve_model(arguments.run[0], [*named, *arguments.overrides], measured=True)
    if arguments.adapter:  # instead of the experiment's own
        experiment = dataclasses.replace(experiment, adapter="")
    if not experiment.evals:
        raise UserError(f"the experiment {experiment.name} has no evals: name one that has")

    from lm.stored import cache_at
    from lm.train.stages import evaluate_open_weights

    data = ", ".join(f"{item.name} on {item.source.path}" for item in experiment.evals)
    print(f"{experiment.init}, by the evals of {experiment.name}: {data}\n", flush=True)
    with cache_at(arguments.cache):
        measured = evaluate_open_weights(experiment, tell, arguments.adapter)
    print(comparison(measured))
    if missing := {item.name for item in experiment.evals} - {
        line["eval"] for lines in measured.values() for line in lines
    }:
        print(f"\nnot measured without a reference, a reward model or collected data: {', '.join(sorted(missing))}")
    return 0


def comparison(measured: dict[str, list[dict[str, Any]]], own: Sequence[dict[str, Any]] = ()) -> str:
    """A table of evals with a column for each model, after the numbers that the run recorded at the same step, if it did."""
    columns = {name or "value": {line["eval"]: line for line in lines} for name, lines in measured.items()}
    steps = {line["step"] for lines in measured.values() for line in lines}
    recorded = {line["eval"]: line for line in own if line["step"] in steps}
    columns = ({"in the run": recorded} if recorded else {}) | columns
    evals = {line["eval"]: line for lines in measured.values() for line in lines}
    rows = [("eval", "metric", "count", *columns)]
    for name, line in evals.items():
        metric = line["metric"]
        values = (f"{found[name][metric]:.4f}" if name in found else "–" for found in columns.values())
        rows.append((name, metric, str(line["count"]), *values))
    return aligned(rows)


def pairs(runs: list[Path], arguments: argparse.Namespace) -> int:
    """Score a file of pairs with one run's model, or with several runs' together."""
    from lm.stored import cache_at
    from lm.train.judging import judge_pairs
    from lm.web.pairs_page import write_pairs_page

    with cache_at(arguments.cache):
        judged = judge_pairs(runs, arguments.stage, arguments.pairs, arguments.heldout)
    print(json.dumps(judged.to_json(), indent=1) if arguments.json else pairs_text(judged))
    if arguments.page:
        write_pairs_page(judged, arguments.page)
        if not arguments.json:
            print(f"\n{arguments.page}")
    return 0


def pairs_text(judged: PairScores) -> str:
    """Format the result of `judge_pairs` for a terminal."""
    worth = judged.worth
    lines = [
        f"{judged.what}: {len(judged.scored.gaps):,} pairs of {judged.path}"
        + (f", {judged.scored.cut:,} cut" if judged.scored.cut else "")
        + (f", {judged.scored.left_out:,} left out" if judged.scored.left_out else "")
        + (f", {judged.scored.ties:,} ties" if judged.scored.ties else ""),
        "",
        f"accuracy            {_interval(worth.accuracy)}   95 % by bootstrap over prompts",
    ]
    if len(judged.members) > 1:
        lines.append(f"  of each           {', '.join(f'{100 * one:.1f} %' for one in judged.members)}")
    taken = "shorter" if worth.shorter else "longer"
    lines += [
        f"the {taken:<7} answer  {_interval(worth.baseline)}   chosen on {judged.baseline_of}",
        f"lead over it        {_interval(worth.lead)}   of the same pairs",
        f"log-loss            {worth.log_loss:.3f} nats   (a coin: 0.693)",
        f"calibration error   {worth.calibration_error:.3f}",
        "",
        "chosen longer by    right    pairs",
    ]
    lines += [f"{one.mean:>+9.0f} tokens   {100 * one.right:5.1f} %   {one.pairs:,}" for one in worth.by_length]
    return "\n".join([*lines, *textwrap.wrap(judged.remark, 80)])


def _interval(found: BootstrapEstimate) -> str:
    return f"{100 * found.mean:5.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(lines: list[dict[str, Any]], own: list[dict[str, Any]]) -> str:
    """Table of the new measurements (as in eval.jsonl) beside the run's own at the same step.

    The last line says whether they agree.
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
    return f"{aligned(rows)}\n\n{_verdict(lines, recorded, differ)}"


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of a table as text: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_row(row, widths) for row in rows)


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    words = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(words).rstrip()


def _verdict(lines: list[dict[str, Any]], recorded: dict[tuple[int, str], dict[str, Any]], differ: list[str]) -> str:
    if differ:
        return f"differs from the run's own: {', '.join(differ)}"
    if not any((line["step"], line["eval"]) in recorded for line in lines):
        return "the run has no measurements of its own at this step"
    return "the same as the run's own"
