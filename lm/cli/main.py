"""Entry point `lm COMMAND …`: dispatches to the command's module and turns errors into exit codes."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import errno
import functools
import glob
import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

from lm import __version__
from lm.allocator import ALLOCATOR
from lm.cli.arguments import EXIT_INTERRUPT, EXIT_PIPE, EXIT_TERMINATED, EXIT_USER
from lm.config.field import LONGEST_VALUE, message_line
from lm.experiment import Experiment, UserError, nearest
from lm.parallel.topology import GPU_MEMORY

COMMANDS = {
    "run": "train an experiment, or resume it",
    "config": "show the resolved value of an experiment, and every knob",
    "data": "show decoded batches, with the loss mask in colour",
    "env": "check an environment or a verifier on its tasks",
    "sample": "answer prompts with a trained model",
    "chat": "talk to a trained model",
    "export": "write a trained model as a folder that transformers reads",
    "serve": "serve models over the OpenAI protocol, with a chat page",
    "label": "compare answers on a page, and collect preferences",
    "eval": "evaluate a checkpoint on the held-out data again",
    "playground": "ask several models the same tasks, and compare pass rates and cost",
    "plan": "estimate memory and step time on TPUs or GPUs, and choose a mesh",
    "sweep": "run the trials of a sweep with any number of workers",
    "compare": "compare runs over seeds, with intervals and p-values",
    "rerun": "train a run again and check that every number is the same",
    "reproduce": "test a claim of a paper, and write the verdict",
    "rollouts": "look at sampled trajectories on a page, token by token",
    "report": "write report.html: samples, held-out numbers and curves of a run",
    "runs": "list runs with state and size, or remove some",
    "launch": "start a run on a TPU pod, a cluster, or in local processes",
    "completion": "make bash, zsh or fish complete commands, names and fields",
}

# Environment to set before jax and its libraries are imported, unless set already.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA: errors only
    "GRPC_VERBOSITY": "ERROR",
    "TFDS_DISABLE_NETWORK_TELEMETRY": "1",
}

# Device files of TPUs, NVIDIA's and AMD's GPUs, and of GPUs under Windows.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")

# OSErrors that a user can cause: a full disk, missing permissions, an invalid path. Any other OSError is
# a bug.
REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST,
)  # fmt: skip


_interrupted: int | None = None  # the exit code, after a signal has ended the command


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, allows no abbreviations, and knows its own flags."""

    def __init__(self, **options: Any):
        self.flags: set[str] = set()
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, conflict_handler="resolve", formatter_class=form, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        self.flags |= {name for name in names if name.startswith("-")}
        return super().add_argument(*names, **options)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of an option; of `--option=--` some versions of argparse make an empty list, whatever its type."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise UserError(f"argument {action.option_strings[-1]}: '--' is no value")
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def error(self, message: str):
        raise UserError(f"{message} (`{self.prog} --help` shows what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 after a user's error, 130 after Ctrl-C, 143 after SIGTERM.

    The process itself then ends by SIGTERM, which a shell shows as 143.
    """
    if argv is not None:
        return _run(list(argv))
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions (`lm completion`)
        importlib.import_module("lm.cli.completion").complete(COMMANDS, Parser)
    _start_with_allocator()
    atexit.register(_end_if_interrupted)  # the first that is registered is the last that is called
    sys.unraisablehook = interrupted_again
    signal.signal(signal.SIGINT, interrupt)  # also where a script that began this in its background has it ignored
    signal.signal(signal.SIGTERM, interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    code = _run(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):  # one that arrives while Python ends would show a traceback
        signal.signal(number, signal.SIG_DFL)
    return code


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C and SIGTERM: raises KeyboardInterrupt(number), but inside an import ends the process at once.

    A library that is interrupted while it is imported stays half made, and then hangs or crashes.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        frame = frame.f_back
    raise KeyboardInterrupt(number)


def _end_if_interrupted() -> None:
    """End the process after a Ctrl-C or SIGTERM before Python takes its modules apart.

    A computation that the signal has left running in another thread would crash then.
    """
    if _interrupted is not None:
        with contextlib.suppress(OSError):  # the reader of a pipe has gone
            sys.stdout.flush()
            sys.stderr.flush()
        if _interrupted == EXIT_TERMINATED:  # as inside an import, so that whoever sent it sees one way to end
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(_interrupted)  # also the first process of a container, which a signal without a handler does not end


def interrupted_again(told: Any) -> None:
    """Hook for exceptions that Python cannot raise: a Ctrl-C inside a destructor, which would be lost, comes once more."""
    if isinstance(told.exc_value, KeyboardInterrupt):
        number = signal.SIGTERM if signal.SIGTERM in told.exc_value.args else signal.SIGINT
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(told)


def _run(words: list[str]) -> int:
    settings = ENVIRONMENT | ({"JAX_PLATFORMS": "cpu"} if _libtpu_without_a_tpu() else {})
    if not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):  # an older name of the same setting
        settings |= {"XLA_CLIENT_MEM_FRACTION": str(GPU_MEMORY)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return exit_code(functools.partial(_dispatch, words))


def exit_code(command: Callable[[], int]) -> int:
    """Run a command, or the part of one that has a process of its own; prints a user's error in one line, and returns the exit code."""
    global _interrupted
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"lm: error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt as error:
        _interrupted = EXIT_TERMINATED if signal.SIGTERM in error.args else EXIT_INTERRUPT
        return _interrupted
    except BrokenPipeError:  # the reader has closed the pipe: discard the rest of the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        name = str(error.filename or "a file")
        name = name if len(name) <= LONGEST_VALUE else f"{name[:LONGEST_VALUE]}…"
        print(f"lm: error: {message_line(name)}: {error.strerror}", file=sys.stderr)
        return EXIT_USER


def _check_current_folder() -> None:
    """Raise UserError if the current folder has been removed, since every relative path would fail."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed: change to one that is there (cd)") from None


def _libtpu_without_a_tpu() -> bool:
    """Whether libtpu is installed on a machine without any accelerator: asked for its TPU, it prints a page of warnings."""
    told = any(name.startswith("TPU_") for name in os.environ)
    return not told and not any(map(glob.glob, ACCELERATORS)) and importlib.util.find_spec("libtpu") is not None


def _start_with_allocator() -> None:
    """Re-execute the process once with ALLOCATOR in its environment, unless set already."""
    if sys.platform == "linux" and not ALLOCATOR.keys() & os.environ.keys():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # an interpreter that starts has no answer to Ctrl-C
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


def _dispatch(words: list[str]) -> int:
    _check_current_folder()
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, *rest = words
    if name == "--version":
        print(f"lm {__version__}")
        return 0
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r}{hint}")
    module = importlib.import_module(f"lm.cli.{name}")
    parser = Parser(prog=f"lm {name}", description=module.__doc__)
    module.configure(parser)
    overrides: list[str] = []
    if module.TAKES_OVERRIDES:
        rest, overrides = split_overrides(rest, parser.flags)
        parser.set_defaults(overrides=overrides)
    try:
        arguments = parser.parse_args(rest)
    except SystemExit:  # argparse has printed the help
        return 0
    try:
        return module.call(arguments)
    except KeyboardInterrupt:
        # A command with work that can be resumed says what it has kept; the others end without a word.
        if hasattr(module, "on_interrupt") and (kept := module.on_interrupt(arguments)):
            print(f"lm {name}: stopped. {kept}", file=sys.stderr)
        raise


def split_overrides(words: Iterable[str], flags: set[str]) -> tuple[list[str], list[str]]:
    """Split the words into the command's own and overrides (`--a.b.c VALUE`, `--a.b.c=VALUE`).

    Raises:
        UserError: a word is neither, and resembles one of the command's own.
    """
    fields = {field.name for field in dataclasses.fields(Experiment)}
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or word.split("=", 1)[0] in flags:
            own.append(word)
            continue
        name = word.split("=", 1)[0]
        if "." not in name and name[2:] not in fields and (hint := nearest(name, sorted(flags))):
            raise UserError(f"no flag {name}{hint}")
        overrides.append(word)
        if "=" not in word:
            overrides.extend(value for value in [next(rest, None)] if value is not None)
    return own, overrides


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lm COMMAND …",
            "",
            "Train a language model from random weights to a reasoner.",
            "",
            *lines,
            "",
            "`lm COMMAND --help` tells more. To begin: `lm run quickstart`",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
