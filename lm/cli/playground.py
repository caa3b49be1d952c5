"""Ask several models the same tasks, and compare pass rates, speed and cost.

The tasks are rows with a prompt and what the verifier needs: tests for code
(the verifier python_tests, which runs it in a sandbox), an answer for sums:

  lm playground code.jsonl quickstart:sft FOLDER --page play.html
  lm playground sums.jsonl A B --verifier answer --answers 8 --temperature 1

A model is RUN, RUN:STAGE, or a published model. The table has pass@k with its
standard error over tasks, parameters and tokens per second on this machine, and
for answers the mean FLOPs and tokens, and the fraction cut at the token limit.
--page has the table, and every answer beside those of the other models."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from lm.cli.arguments import at_least, find_model, number, page_path, weights_of
from lm.cli.eval import aligned
from lm.experiment import Eval, Source, UserError

if TYPE_CHECKING:
    from lm.train.playground import Player, Playground

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASKS", help="a file of rows with prompts, or another source of rows")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="RUN, RUN:STAGE, or a published model")
    parser.add_argument(
        "--verifier", metavar="NAME", default="python_tests", help="what judges an answer (%(default)s)"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=at_least(1),
        default=100,
        help="at most N tasks, the same for all models (%(default)s)",
    )
    parser.add_argument(
        "--answers", metavar="K", type=at_least(1, 1024), default=1, help="answers to a task (%(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=at_least(1, 2**26), default=256, help="longest answer (%(default)s)"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=number(0.01, 100, special=0), default=0.0,
        help="sampling temperature, from 0.01 to 100; 0: greedy (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", metavar="S", type=number(0.01, 86400), default=10.0,
        help="time limit for judging an answer (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", metavar="N", type=at_least(0, 2**32 - 1), default=0, help="seed of the samples (%(default)s)"
    )
    parser.add_argument("--page", metavar="FILE", type=page_path, help="write a page with all answers")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")


def call(arguments: argparse.Namespace) -> int:
    if arguments.answers > 1 and arguments.temperature == 0:
        raise UserError(
            f"--answers is {arguments.answers} and --temperature 0, at which all answers to a task are the same: "
            "give it --temperature 1"
        )
    players = find_players(arguments.models)
    item = Eval(
        "playground", Source(arguments.tasks, holdout=1.0), "pass_at_k", arguments.verifier, arguments.limit, arguments.max_new_tokens,
        arguments.temperature, arguments.answers, arguments.seconds,
    )  # fmt: skip

    from lm.data.bad_rows import ADVICE
    from lm.train.playground import play

    try:
        found = play(players, item, arguments.seed, lambda text: print(text, file=sys.stderr, flush=True))
    except UserError as error:  # in words of this command, which has no eval and no field of a source
        said = str(error).replace("evals.playground.verifier", "--verifier").replace("evals.playground: ", "")
        raise UserError(said.removesuffix(ADVICE)) from error
    print(json.dumps(summary(found), indent=1) if arguments.json else text(found))
    if arguments.page:
        from lm.web.playground import write_playground_page

        write_playground_page(found, arguments.page)
        print(arguments.page, file=sys.stderr)
    return 0


def find_players(names: list[str]) -> list[Player]:
    """The models of these names.

    Raises:
        UserError: there is no such run, stage or published model, or a name is given twice.
    """
    found = [find_model(name, None) if weights_of(name) else find_model(*_run_and_stage(name)) for name in names]
    if len(set(found)) < len(found):
        raise UserError(f"{' '.join(names)} names a model twice")
    short = [name.rsplit("/", 1)[-1] for name in names]

    from lm.train.playground import Player

    shown = short if len(set(short)) == len(short) else names
    return [Player(name, *where) for name, where in zip(shown, found, strict=True)]


def _run_and_stage(name: str) -> tuple[str, str | None]:
    run, _, stage = name.partition(":")
    return run, stage or None


def text(found: Playground) -> str:
    """The table and what belongs to it, for a terminal."""
    sizes = list(found.results[0].rates)
    rows = [("model", *(f"pass@{k}" for k in sizes), "±", "size", "tokens/s", "GFLOP", "tokens", "cut")]
    for one in found.results:
        rates = [f"{100 * one.rates[k][0]:.1f} %" for k in sizes]
        error, size = f"{100 * one.rates[sizes[-1]][1]:.1f}", f"{one.parameters / 1e6:,.1f}M"
        cost = (f"{one.tokens_per_s:,.0f}", one.gflop, f"{one.length:.0f}", f"{100 * one.cut:.0f} %")
        rows.append((one.name, *rates, error, size, *cost))
    lines = [
        f"{len(found.tasks)} tasks of {found.item.source.path}, judged by {found.item.verifier}",
        "",
        aligned(rows),
    ]
    if found.left_out:
        lines.append(f"left out: {found.left_out} tasks that do not fit in the context of every model")
    if late := {one.name: one.timeouts for one in found.results if one.timeouts}:
        lines.append(
            f"judging took too long, counted as failed: {', '.join(f'{n} of {name}' for name, n in late.items())}"
        )
    return "\n".join([*lines, *found.notes])


def summary(found: Playground) -> dict[str, object]:
    """The numbers of the table as one object."""
    return {
        "tasks": len(found.tasks),
        "left_out": found.left_out,
        "models": [{name: value for name, value in vars(one).items() if name != "answers"} for one in found.results],
    }
