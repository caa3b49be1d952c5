"""Talk to the model of a run.

Ctrl-C stops an answer; at the prompt it ends the conversation, and so do
Ctrl-D and an empty line. /clear begins a new conversation, /help shows this.
/adapter NAME switches to an adapter given with --adapter, by its folder's name."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import re
import signal
import sys
from collections.abc import Collection
from typing import Any

from lm.cli.arguments import MODEL_HELP, add_sampling, find_model, sampling
from lm.experiment import UserError
from lm.web.text import visible

TAKES_OVERRIDES = False
LONGEST = 8192  # tokens of a conversation with open weights, whose own context may be too large for a cache
Messages = list[dict[str, str]]
HELP = "/clear begins a new conversation, /adapter NAME switches to another adapter, /help shows this; Ctrl-C stops an answer; Ctrl-D or an empty line ends"
COMMAND = re.compile(r"/[a-z]+( \S+)?")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=MODEL_HELP)
    add_sampling(parser, temperature=0.7, max_new_tokens=256)


def call(arguments: argparse.Namespace) -> int:
    run_dir, stage = find_model(arguments.run, arguments.stage)
    with contextlib.suppress(ImportError):  # line editing and history, where the system has them
        import readline  # noqa: F401

    from lm.data.chat import render
    from lm.rollout.sampler import compile_stream
    from lm.train.compilations import keep_compilations
    from lm.train.loaded_run import load_adapters, load_run

    keep_compilations()
    adapters = load_adapters(load_run(run_dir, stage, LONGEST), run_dir, arguments.adapter)
    loaded = next(iter(adapters.values()))
    render(
        [{"role": "user", "content": "hello"}], loaded.tokenizer, generation_prompt=True
    )  # raises without a template
    print(f"{run_dir}{f', after stage {stage}' if stage else ''}; {HELP}", flush=True)
    # While the first question is typed; the first answer waits for it.
    compiler = concurrent.futures.ThreadPoolExecutor(1)
    compiled = compiler.submit(compile_stream, loaded.model, loaded.tokenizer, arguments.top_k, arguments.top_p)
    messages: Messages = []
    turn = 0
    while text := _ask():
        if COMMAND.fullmatch(text):
            print(command(text, messages, adapters))
            loaded = adapters.get(text.removeprefix("/adapter "), loaded)
            continue
        try:
            compiled.result()
        except KeyboardInterrupt as error:
            stopped(error)
            continue
        asked = [*messages, {"role": "user", "content": text}]
        answer(loaded, asked, messages, sampling(arguments), arguments.seed + turn)
        turn += 1
    return 0


def stopped(error: KeyboardInterrupt) -> None:
    """Say that Ctrl-C has stopped an answer; a SIGTERM ends the conversation."""
    if signal.SIGTERM in error.args:
        raise error
    print(" [stopped]")


def command(text: str, messages: Messages, adapters: Collection[str] = ()) -> str:
    """Run a line that begins with / on the conversation; returns what to print."""
    word, _, name = text.partition(" ")
    if text == "/clear":
        messages.clear()
        return "[a new conversation]"
    if word == "/adapter":
        there = ", ".join(filter(None, adapters)) or "none, --adapter FOLDER names one"
        return f"[adapter {name}]" if name in adapters else f"[no adapter {name or 'without a name'}; there is {there}]"
    return f"[{HELP}]" if text == "/help" else f"[no command {text}; {HELP}]"


def answer(loaded: Any, asked: Messages, messages: Messages, options: dict[str, Any], seed: int) -> None:
    """Stream the answer to `asked` and update `messages`; it is emptied where the context is full.

    Ctrl-C stops the answer; its beginning stays in the conversation.
    """
    from lm.data.chat import render
    from lm.rollout.sampler import stream

    said = ""
    try:
        for piece in stream(loaded.model, loaded.tokenizer, asked, **options, seed=seed):
            said += piece
            print(visible(piece), end="", flush=True)
    except UserError as error:
        messages.clear()
        print(f"[the context is full: {error}; a new conversation]")
        return
    except KeyboardInterrupt as error:
        stopped(error)
        if not said:
            return
    else:
        print()
    messages[:] = [*asked, {"role": "assistant", "content": said}]
    used, room = len(render(messages, loaded.tokenizer).tokens), loaded.experiment.model.max_len
    if used >= room:
        messages.clear()
        print(f"[the context of {room} tokens is full; a new conversation]")


def _ask() -> str:
    try:
        return input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
