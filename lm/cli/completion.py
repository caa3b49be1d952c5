"""Print what makes a shell complete `lm` commands with the Tab key.

  eval "$(lm completion bash)"        in ~/.bashrc
  eval "$(lm completion zsh)"         in ~/.zshrc, after compinit
  lm completion fish | source         in ~/.config/fish/config.fish

Completed are commands, options, names of experiments, sweeps and runs, stages,
and the fields of the experiment on the command line (--model.num_layers) with
their values where these have names."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import FilesCompleter

from lm.changes import stored_experiment
from lm.experiment import Experiment, UserError
from lm.files import EXPERIMENTS, load
from lm.overrides import knobs, leaf

TAKES_OVERRIDES = False
SHELLS = ("bash", "zsh", "fish")
SWEEPS, NO_EXPERIMENTS = ("ablations", "papers"), ("ablations", "papers", "pods")  # folders below experiments/
MOST_FIELDS = 60  # further ones are completed part by part: --model., then --model.num_layers


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")


def call(arguments: argparse.Namespace) -> int:
    shell = "bash" if arguments.shell == "zsh" else arguments.shell  # argcomplete has one text for both
    print(argcomplete.shellcode(["lm"], shell=shell))
    return 0


def complete(commands: Mapping[str, str], make_parser: type[argparse.ArgumentParser]) -> None:
    """Write the completions of the command line in COMP_LINE, as argcomplete does, and end the process."""
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT") or 0) or None]
    words = _words(line)
    typed = "" if line.endswith(" ") or not words else words.pop()
    parser = make_parser(prog="lm")
    below = parser.add_subparsers(parser_class=make_parser)
    for name, text in commands.items():
        command = below.add_parser(name, help=text)
        if words[1:2] == [name]:
            module = importlib.import_module(f"lm.cli.{name}")
            module.configure(command)
            subject = next((word for word in words[2:] if not word.startswith("-")), "")
            option = typed if typed.startswith("--") else words[-1]
            if module.TAKES_OVERRIDES and option.startswith("--"):
                _add_fields(command, subject, option)
            _add_completers(command, subject)
    argcomplete.autocomplete(parser, default_completer=FilesCompleter())


def _words(line: str) -> list[str]:
    """The words of an unfinished command line."""
    for end in ("", '"', "'"):
        with contextlib.suppress(ValueError):
            return shlex.split(line + end)
    return line.split()


def _add_completers(parser: argparse.ArgumentParser, subject: str) -> None:
    names: dict[str, Callable[[], Iterable[str]]] = {
        "EXPERIMENT": experiment_names, "RUN": run_names, "RUN | SWEEP": run_names, "SWEEP": sweep_names, "FOLDER": run_names,
    }  # fmt: skip
    for action in parser._actions:
        if action.dest in ("stage", "until"):
            action.completer = _offering(lambda: stage_names(subject))  # type: ignore[attr-defined]
        elif not action.option_strings and isinstance(action.metavar, str) and action.metavar in names:
            action.completer = _offering(names[action.metavar])  # type: ignore[attr-defined]


def _offering(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """A completer of these names and of files."""
    return lambda prefix, **_: [*filter(lambda name: name.startswith(prefix), names()), *FilesCompleter()(prefix)]


def _add_fields(parser: argparse.ArgumentParser, name: str, typed: str) -> None:
    """Add the fields of an experiment that begin with what is typed, as options; the names of parts where there are many."""
    experiment = _experiment(name)
    if experiment is None:
        return
    helps = {knob.name: knob.help for knob in knobs(experiment) if f"--{knob.name}".startswith(typed)}
    parts = _parts(helps, typed.removeprefix("--"))
    while len(parts) == 1 and parts[0].endswith("."):  # the shell adds this part itself
        parts = _parts(helps, parts[0])
    offered: Iterable[str] = helps if len(helps) <= MOST_FIELDS else parts
    for field in offered:
        action = parser.add_argument(f"--{field}", help=helps.get(field, "").replace("%", "%%"))
        if not field.endswith("."):
            action.completer = _values(leaf(experiment, field)[0])  # type: ignore[attr-defined]


def _parts(fields: Iterable[str], typed: str) -> list[str]:
    """The fields up to the first dot after what is typed."""
    return list(dict.fromkeys(field[: field.find(".", len(typed)) + 1] or field for field in fields))


def _values(kind: Any) -> Callable[..., Iterable[str]]:
    """A completer of a field's values by its type."""
    kinds = [kind, *get_args(kind)]
    literal = next((one for one in kinds if get_origin(one) is Literal), None)
    if literal is not None:
        return lambda **_: get_args(literal)
    if kind is bool:
        return lambda **_: ("true", "false")
    return FilesCompleter() if str in kinds else lambda **_: ()


def _experiment(name: str) -> Experiment | None:
    """The experiment on the command line, if it can be loaded."""
    with contextlib.suppress(UserError, OSError):
        return load(name)
    return None


def experiment_names() -> list[str]:
    """Names of experiments, here and of the clone."""
    return sorted(name for name in _modules() if name.split(".")[0] not in NO_EXPERIMENTS)


def sweep_names() -> list[str]:
    return sorted(name for name in _modules() if name.split(".")[0] in SWEEPS)


def _modules() -> set[str]:
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for folder in EXPERIMENTS
        for path in folder.rglob("*.py")
    }


def run_names() -> list[str]:
    """Names of the runs in runs/."""
    return sorted(file.parent.name for file in Path("runs").glob("*/experiment.json"))


def stage_names(name: str) -> list[str]:
    """Names of the stages of a run or an experiment."""
    with contextlib.suppress(UserError, OSError):
        run = next((path for path in (Path(name), Path("runs") / name) if (path / "experiment.json").is_file()), None)
        if run is not None:
            return [stage["name"] for stage in stored_experiment(run)["stages"]]
    experiment = _experiment(name)
    return [stage.name for stage in experiment.stages] if experiment else []
