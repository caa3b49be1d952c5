"""Talk to the model of a run. An empty line or Ctrl-D ends the conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from lm.cli.arguments import RUN_HELP, add_sampling, find_run, find_stage, sampling
from lm.experiment import UserError
from lm.web.text import visible

TAKES_OVERRIDES = False
Messages = list[dict[str, str]]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_sampling(parser, temperature=0.7, max_new_tokens=256)


def call(arguments: argparse.Namespace) -> int:
    run_dir = find_run(arguments.run)
    stage = find_stage(run_dir, arguments.stage)
    with contextlib.suppress(ImportError):  # line editing and history, where the system has them
        import readline  # noqa: F401

    from lm.train.models import load_run

    loaded = load_run(run_dir, stage)
    print(f"{run_dir}, after stage {stage}; an empty line ends the conversation")
    messages: Messages = []
    turn = 0
    while text := _ask():
        answer(
            loaded, [*messages, {"role": "user", "content": text}], messages, sampling(arguments), arguments.seed + turn
        )
        turn += 1
    return 0


def answer(loaded: Any, asked: Messages, messages: Messages, options: dict[str, Any], seed: int) -> None:
    """Streams the answer to `asked` and makes `messages` the conversation so far; empty where the context is full."""
    from lm.data.chat import render
    from lm.rollout.sampler import stream

    said = ""
    try:
        for piece in stream(loaded.model, loaded.tokenizer, asked, **options, seed=seed):
            said += piece
            print(visible(piece), end="", flush=True)
    except UserError as error:
        messages.clear()
        print(f"[the context is full: {error}; the conversation begins anew]")
        return
    print()
    messages[:] = [*asked, {"role": "assistant", "content": said}]
    used, room = len(render(messages, loaded.tokenizer).tokens), loaded.experiment.model.max_len
    if used >= room:
        messages.clear()
        print(f"[the context of {room} tokens is full; the conversation begins anew]")


def _ask() -> str:
    try:
        return input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
