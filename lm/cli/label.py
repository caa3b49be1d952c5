"""Compare answers on a page, and collect preferences.

The answers are rows with `prompt` and `answers` (and `sources`, if they have
names), or are sampled from a run:

  lm label answers.jsonl
  lm label quickstart --prompts prompts.jsonl --temperature 0.7 1.0
  lm label quickstart --prompts prompts.jsonl --stage sft preference

The last is a blind comparison of two stages; `--adapter A --adapter B` compares
two PEFT adapters on one model. Choices go to a file beside the
answers, each before the page moves on, and the same command continues where it
stopped. With --export they become rows of `prompt`, `chosen`, `rejected`, which
a preference stage trains on: for a pair with several judgements the answer
preferred by more than half of the votes, ties and both bad included. Other
pairs are left out (--ties keeps ties, which a reward model can train on).

The page is for this machine. `--host 0.0.0.0` opens it to others: they need the
printed link, with its token. It is plain HTTP: on a network that you do
not trust, put it behind a proxy with TLS."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from lm.cli.arguments import (
    access_token,
    add_address,
    add_sampling,
    at_least,
    find_model,
    find_run,
    find_stage,
    link,
    number,
    sampling,
)
from lm.experiment import UserError

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RUN_OR_JSONL", help="rows with prompt and answers, or a run to sample from")
    add_sampling(parser, temperature=1.0, max_new_tokens=128)
    parser.add_argument(
        "--stage", metavar="NAME", nargs="+", help="the models after these stages; else after the last one trained"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=number(0.01, 100, special=0), nargs="+", default=[1.0],
        help="sampling temperature; several are used in turn for the answers to a prompt (1.0)",
    )  # fmt: skip
    parser.add_argument("--against", metavar="RUN[:STAGE]", nargs="+", default=[], help="other runs that also answer")
    parser.add_argument("--prompts", metavar="FILE", default="", help="rows with prompts; else the experiment's own")
    parser.add_argument(
        "--limit", metavar="N", type=at_least(1), default=100, help="take at most N prompts (%(default)s)"
    )
    parser.add_argument(
        "--answers",
        metavar="K",
        type=at_least(1, 1000),
        help="answers of each model to a prompt (2, or 1 of several models)",
    )
    parser.add_argument(
        "--answers-file", metavar="FILE", type=Path, help="file of the sampled answers (RUN/label/answers.jsonl)"
    )
    parser.add_argument("--labels", metavar="FILE", type=Path, help="the file of choices; else NAME.labels.jsonl")
    parser.add_argument(
        "--annotators-per-pair", metavar="N", type=at_least(1), default=1, help="people who judge a pair (%(default)s)"
    )
    add_address(parser)
    parser.add_argument(
        "--export",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(),
        help="write preferences and exit (NAME.preferences.jsonl)",
    )
    parser.add_argument("--ties", action="store_true", help="with --export: ties too, as rows with `tie` true")


def call(arguments: argparse.Namespace) -> int:
    answers = _answers_file(arguments)
    labels = arguments.labels or _beside(answers, "labels")
    if arguments.export is not None:
        target = arguments.export if arguments.export.name else _beside(answers, "preferences")
        return export(labels, target, arguments.ties)
    if arguments.ties:
        raise UserError("--ties is about what --export writes: give both")

    from lm.choices.desk import Desk
    from lm.choices.log import open_log
    from lm.choices.pairs import make_task
    from lm.data.sources import load_rows

    if _is_run(arguments.what):
        _sample(arguments, answers)
    task = make_task(load_rows(str(answers)))
    token = access_token(arguments.host, arguments.token_file)
    with open_log(labels) as log:
        desk = Desk(task.pairs, log, per_pair=arguments.annotators_per_pair, seed=arguments.seed)
        remarks = [*task.remarks, log.remark, desk.strangers()]
        print("\n".join(remark for remark in remarks if remark), end="\n" if any(remarks) else "")
        serve(desk, arguments, token)
    return 0


def serve(desk: Any, arguments: argparse.Namespace, token: str | None) -> None:
    """Serve until Ctrl-C."""
    from lm.label.server import Server

    server = Server(desk, arguments.host, arguments.port, token)
    print(f"{len(desk)} pairs, judged by {desk.per_pair} each; choices go to {desk.log.path}")
    print(f"open {link(arguments, server.server_port, token)} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt as error:
        print(f"\n{desk.log.path} is saved: the same command continues, --export writes preferences from it")
        if signal.SIGTERM in error.args:
            raise
    finally:
        server.server_close()


def export(labels: Path, target: Path, ties: bool = False) -> int:
    from lm.choices.export import preferences, write_rows
    from lm.choices.log import read_log

    if not labels.is_file():
        raise UserError(
            f"there is no file of choices {labels} yet: `lm label` makes it (or name it with --labels FILE)"
        )
    contents = read_log(labels)
    exported = preferences(contents.records, ties)
    if not exported.rows:
        why = "no pair of which most votes prefer one answer" + (", and no tie" if ties else "")
        raise UserError(f"{labels} has {why}: nothing to export")
    write_rows(target, exported.rows)
    if contents.remark:
        print(contents.remark)
    tied = f", {sum('tie' in row for row in exported.rows)} of them ties" if ties else ""
    print(f"{target}: {len(exported.rows)} preferences{tied}")
    undecided = f"{exported.undecided} pairs of which most say {'' if ties else 'tie or '}both bad, or all skipped"
    print(f"left out: {undecided}, {exported.even} of which no answer has more than half of the votes")
    return 0


def _is_run(what: str) -> bool:
    from lm.data.readers import kind_of

    return not Path(what).is_file() and kind_of(Path(what)) is None


def _answers_file(arguments: argparse.Namespace) -> Path:
    """Path of the file of answers, which need not exist yet where answers are sampled."""
    if _is_run(arguments.what):
        if arguments.answers_file is not None:
            return arguments.answers_file
        folder, stage = find_model(arguments.what, None)
        if stage is None:
            raise UserError(f"{folder} is a published model: name the file of the sampled answers, --answers-file FILE")
        return folder / "label" / "answers.jsonl"
    for flag in ("prompts", "against", "stage", "adapter", "answers", "answers_file"):
        if getattr(arguments, flag):
            name = flag.replace("_", "-")
            raise UserError(f"--{name} is for answers that are sampled from a run; {arguments.what} has its own")
    return Path(arguments.what)


def _beside(answers: Path, what: str) -> Path:
    from lm.data.readers import kind_of

    return answers.with_name(answers.name.removesuffix(kind_of(answers) or "") + f".{what}.jsonl")


def _sample(arguments: argparse.Namespace, path: Path) -> None:
    """Sample the file of answers unless it exists."""
    who = [find_model(arguments.what, stage) for stage in arguments.stage or [None]]
    for other in arguments.against:
        name, _, stage = other.partition(":")
        who.append((find_run(name), find_stage(find_run(name), stage or None)))

    from lm.train.answers import Contestant, SamplingRequest, sample_rows

    contestants = [
        Contestant(folder, stage or "", adapter)
        for folder, stage in dict.fromkeys(who)
        for adapter in dict.fromkeys(arguments.adapter or [""])
    ]
    answers = arguments.answers or (2 if len(contestants) == 1 else 1)
    if len(contestants) == 1 and answers < 2:
        raise UserError(
            "--answers 1 leaves nothing to compare: ask for 2 or more, or for several stages, runs or adapters"
        )
    given = sampling(arguments) | {"temperatures": tuple(arguments.temperature)}
    del given["temperature"]
    asked = SamplingRequest(arguments.prompts, arguments.limit, answers, seed=arguments.seed, **given)
    print(f"{'sampled' if sample_rows(contestants, asked, path) else 'kept'}: the answers in {path}", flush=True)
