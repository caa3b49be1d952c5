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
import secrets
import socket
from pathlib import Path
from typing import Any

from lm.cli.arguments import add_sampling, at_least, find_model, find_run, find_stage, number, sampling
from lm.experiment import UserError

TAKES_OVERRIDES = False
LOCALHOST = "localhost"
SHORTEST_TOKEN = 16


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
    parser.add_argument("--host", default=LOCALHOST, help="address to serve on (%(default)s: this machine only)")
    parser.add_argument(
        "--port", metavar="N", type=at_least(0, 65_535), default=8000, help="0: any that is free (%(default)s)"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", type=Path, help="file with the access token; else one is generated"
    )
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
    token = _token(arguments.host, arguments.token_file)
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
    print(f"open {_link(arguments, server.server_port, token)} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{desk.log.path} is saved: the same command continues, --export writes preferences from it")
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


def _token(host: str, file: Path | None) -> str | None:
    """The access token: from the file, or a new one where other machines are served."""
    from lm.web.local_server import LOCAL

    if file is None:
        return None if host in LOCAL else secrets.token_urlsafe(24)
    if not file.is_file():
        raise UserError(f"--token-file {file}: there is no such file")
    token = file.read_text("utf-8", errors="replace").strip()
    if len(token) < SHORTEST_TOKEN or not all(
        letter.isascii() and (letter.isalnum() or letter in "-_") for letter in token
    ):
        raise UserError(f"--token-file {file} must hold {SHORTEST_TOKEN} or more letters, digits, - or _")
    return token


def _link(arguments: argparse.Namespace, port: int, token: str | None) -> str:
    everywhere = arguments.host in ("0.0.0.0", "::", "")
    host = socket.gethostname() if everywhere else arguments.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    if token is None:
        return address
    return f"{address}?token={f'TOKEN, with what {arguments.token_file} holds' if arguments.token_file else token}"
