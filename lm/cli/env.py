"""Check an environment or a verifier on its tasks, before a run trains on it.

  lm env check countdown
  lm env check gym:chain_sum
  lm env check my_file:Guess --data tasks.jsonl
  lm env check answer --data train.jsonl --heldout test.jsonl

Known answers must get the full reward, bad ones less (empty, garbage, very
long, invalid UTF-8, cut tool calls, answers to other tasks), without an
exception; the same task must give the same messages and rewards; no held-out
task may be a training task. Exits with 2 if a check fails. `lm env list` lists
the environments."""

from __future__ import annotations

import argparse

from lm.cli.arguments import add_cache, at_least, number
from lm.experiment import UserError

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm env check NAME|FILE:CLASS|VERIFIER [options], or lm env list"
    parser.add_argument("action", metavar="ACTION", choices=("check", "list"), help="check or list")
    parser.add_argument("name", metavar="NAME", nargs="?", help="environment or verifier, or one of your own")
    parser.add_argument("--data", metavar="FILE", default="", help="its tasks, a source; else the environment's own")
    parser.add_argument("--heldout", metavar="FILE", default="", help="held-out tasks; else a part of --data")
    parser.add_argument(
        "--holdout", metavar="X", type=number(0, 1), default=0.1, help="held-out part of --data (%(default)s)"
    )
    parser.add_argument("--rows", metavar="N", type=at_least(1), default=50, help="tasks that are played (%(default)s)")
    parser.add_argument(
        "--seconds", metavar="X", type=number(0.001, 10**6), default=10.0, help="time limit of a call (%(default)s)"
    )
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    from lm.rollout.environment_check import check_tasks
    from lm.rollout.environments.table import ENVIRONMENTS, written
    from lm.stored import cache_at

    if arguments.action == "list":
        for name, one in ENVIRONMENTS.items():
            print(f"{written(name, one):14} {one.tasks.format('NAME') or 'tasks: a file with question and answer'}")
        return 0
    if not arguments.name:
        raise UserError("lm env check takes the name of an environment or verifier; lm env list lists environments")
    problems = []
    with cache_at(arguments.cache):
        asked = arguments.data, arguments.heldout, arguments.holdout, arguments.rows, arguments.seconds
        for found in check_tasks(arguments.name, *asked):
            print(f"{'FAILED' if found.problem else 'ok':6}  {found.check:13}  {found.result}", flush=True)
            problems += [f"{found.check}: {found.problem}"] if found.problem else []
    if problems:
        raise UserError(f"{arguments.name}: {problems[0]}")
    return 0
