"""Shared parts of the commands: exit codes, lookup of experiments, runs and stages, options of sampling and of serving."""

from __future__ import annotations

import argparse
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.changes import read_experiment
from lm.check import check
from lm.config.field import Range, describe, nearest, shown
from lm.experiment import OBJECTIVES, Experiment, Model, UserError, from_dict, to_dict
from lm.files import is_open_weights, load
from lm.launch.values import path_problem
from lm.overrides import overridden, override

EXIT_USER, EXIT_INTERRUPT, EXIT_PIPE, EXIT_TERMINATED = 2, 130, 141, 143
EXPERIMENT_HELP = (
    "a name in experiments/, here or of the clone (quickstart), a dotted name below it, or the path of a .py file"
)
RUN_HELP = "a run's folder (runs/quickstart), or its name in runs/"
WEIGHTS_HELP = "or a published model, a folder (config.json, *.safetensors) or GGUF file"
MODEL_HELP = f"{RUN_HELP}; {WEIGHTS_HELP}"


LOCALHOST = "localhost"
SHORTEST_TOKEN = 16
WRITTEN = (".html", ".png", ".csv", ".parquet")  # endings of files that comparisons of runs write


def resolve(name: str, overrides: list[str]) -> Experiment:
    """Load an experiment by name, apply the overrides, and check it.

    Raises:
        UserError: no such experiment or knob, or a value that cannot work.
    """
    return _resolved(load(name), overrides)


def resolve_model(name: str, overrides: list[str], model: Model | None = None, measured: bool = False) -> Experiment:
    """Load an experiment as `resolve` does; for a published model, make the default one on it.

    Args:
        model, measured: of the default experiment (`default_experiment`).

    Raises:
        UserError: as `resolve`; or the overrides name other open weights.
    """
    weights = weights_of(name)
    if weights is None:
        return resolve(name, overrides)
    said = overridden(overrides)
    if "init" in said:
        raise UserError(f"--init is {said['init']}, and {name} is a published model too: name one of them")
    from lm.open_weights import default_experiment  # with jax

    return _resolved(default_experiment(weights, said, model, measured), overrides)


def _resolved(experiment: Experiment, overrides: list[str]) -> Experiment:
    said = overridden(overrides)
    if not (init := said.get("init", experiment.init)):
        return check(override(experiment, overrides))
    from lm.open_weights import with_init  # with jax

    start = with_init(replace(experiment, init=init))
    start = replace(start, model=replace(start.model, max_len=experiment.model.max_len))
    return check(with_init(override(start, overrides), said))


def find_run(name: str) -> Path:
    """Find the folder of a run, given as a path or as a name in runs/.

    Raises:
        UserError: there is none (lists those in runs/), or the folder is not a run (says what is missing).
    """
    tried = [Path(name), Path("runs") / name]
    folder = next((path for path in tried if os.path.isdir(path)), None)
    if folder is None:
        known = sorted(path.parent.name for path in Path("runs").glob("*/experiment.json"))
        raise UserError(f"no run {shown(name)}; runs/ here has: {', '.join(known) or 'nothing'}{nearest(name, known)}")
    if is_open_weights(folder):
        raise UserError(
            f"{folder} is a published model, not a run: lm sample, chat, eval, plan, data, label and export take it; "
            f"other commands take EXPERIMENT --init {folder}"
        )
    if not (folder / "experiment.json").is_file():
        raise UserError(f"{folder} is not a run: it has no experiment.json")
    return folder


def find_model(name: str, stage: str | None) -> tuple[Path, str | None]:
    """Find the folder and the stage of a run, or open weights, which have no stage.

    Raises:
        UserError: there is neither; or the run has no such stage, or no checkpoint of it.
    """
    weights = weights_of(name)
    if weights is not None:
        if stage is not None:
            raise UserError(f"--stage is {stage}; {name} is no run, and has no stages")
        return weights, None
    run_dir = find_run(name)
    return run_dir, find_stage(run_dir, stage)


def weights_of(name: str) -> Path | None:
    """The path of open weights, with or without the prefix of their format; None for any other name."""
    path = Path(name.split(":", 1)[-1]).expanduser()
    return path if is_open_weights(path) else None


def without_pages(names: list[str]) -> list[str]:
    """Filter names of runs: drop files written by comparisons, which `runs/*` also matches.

    Raises:
        UserError: nothing is left.
    """
    left = [name for name in names if not (Path(name).suffix in WRITTEN and Path(name).is_file())]
    if not left:
        raise UserError(f"no run among {', '.join(names)}")
    return left


def find_runs(names: Iterable[str]) -> list[Path]:
    """Find the folders of runs without duplicates (also through links), which are reported."""
    found: dict[Path, Path] = {}
    for name in names:
        folder = find_run(name)
        if folder.resolve() in found:
            print(f"lm: {name} is {found[folder.resolve()]}, named before: it counts once", file=sys.stderr)
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def find_stage(run_dir: Path, name: str | None) -> str:
    """The named stage, or the run's last stage with a checkpoint.

    Raises:
        UserError: the experiment has no such stage, or no checkpoint of it is there.
    """
    plan = to_dict(from_dict(read_experiment(run_dir)))
    names = [stage["name"] for stage in plan["stages"]]
    check_stage(name, names, str(run_dir))
    speaks = [stage["name"] for stage in plan["stages"] if OBJECTIVES[stage["objective"]["kind"]].produces == "policy"]
    candidates = speaks if name is None else names
    folders = {stage: run_dir / "stages" / stage for stage in candidates}
    saved = [
        stage
        for stage, folder in folders.items()
        if (folder / "summary.json").exists() or any(folder.glob("checkpoints/*"))
    ]
    if not saved:
        raise UserError(f"{run_dir} has no checkpoint yet in stages/*/checkpoints: train it with `lm run` first")
    if name is not None and name not in saved:
        raise UserError(f"{run_dir} has no checkpoint of stage {name} yet; it has {', '.join(saved)}")
    return name or saved[-1]


def check_stage(name: str | None, names: Iterable[str], where: str) -> None:
    """Raise UserError, listing the stages, unless `name` is one of them or None."""
    names = list(names)
    if name is not None and name not in names:
        raise UserError(f"{where} has no stage {name!r}; it has {', '.join(names)}{nearest(name, names)}")


def add_sampling(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    """Add the sampling options."""
    parser.add_argument(
        "--adapter", metavar="FOLDER", action="append", default=[],
        help="add a PEFT adapter to the model; can be repeated, to compare several",
    )  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage; else the last one trained")
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=at_least(1, 2**26),
        default=max_new_tokens,
        help="longest answer (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=number(0.01, 100, special=0),
        default=temperature,
        help="sampling temperature, from 0.01 to 100; 0: greedy (%(default)s)",
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=at_least(0),
        default=0,
        help="sample from the K most likely tokens; 0: all (%(default)s)",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=number(0, 1),
        default=1.0,
        help="sample from the most likely tokens of total probability P (%(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=at_least(0, 2**32 - 1), default=0, help="seed of the samples (%(default)s)"
    )


def given_flags(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """The flags whose values differ from these defaults, as words of a command line; a list is a flag given several times."""
    words: list[str] = []
    for name, default in defaults.items():
        flag, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if value != default:
            words += [flag] if value is True else [w for one in _as_list(value) for w in (flag, str(one))]
    return words


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the option of the data cache's folder."""
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=folder_path,
        help="folder for tokenised data, shared by all runs; else lm in $XDG_CACHE_HOME or in ~/.cache",
    )


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the options of address and token."""
    parser.add_argument("--host", default=LOCALHOST, help="address to serve on (%(default)s: this machine only)")
    parser.add_argument(
        "--port", metavar="N", type=at_least(0, 65_535), default=8000, help="port (%(default)s); 0: any free one"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", type=Path, help="file with the access token; else one is generated"
    )


def add_slots(parser: argparse.ArgumentParser) -> None:
    """Add the options that determine a server's memory."""
    parser.add_argument(
        "--slots", metavar="N", type=at_least(1, 1024), default=0,
        help="completions of a model that are sampled at once (40 on a CPU, 64 on other devices)",
    )  # fmt: skip
    parser.add_argument(
        "--length", metavar="N", type=at_least(2, 2**26), default=0,
        help="longest prompt with its completion, in tokens (the model's context, at most 2048; less if memory is short)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=at_least(1, 2**26), default=0,
        help="longest completion, in tokens (half of the length, at most 1024)",
    )  # fmt: skip


def access_token(host: str, file: Path | None) -> str | None:
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


def link(arguments: argparse.Namespace, port: int, token: str | None) -> str:
    """The address to open, with the token unless a file holds it."""
    everywhere = arguments.host in ("0.0.0.0", "::", "")
    host = socket.gethostname() if everywhere else arguments.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    if token is None:
        return address
    return f"{address}?token={f'TOKEN, with what {arguments.token_file} holds' if arguments.token_file else token}"


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options as keyword arguments of the sampler."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


@dataclass(frozen=True)
class NumberIn:
    """An argparse type: an int or a float within a range."""

    kind: type
    range: Range

    def __call__(self, text: str) -> Any:
        """Parse the number; raises argparse's error, with text and range, for anything else."""
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if value not in self.range:
            raise argparse.ArgumentTypeError(f"it is {shown(text)}; it should be {describe(self.kind, self.range)}")
        return value


def at_least(least: int, most: int = 10**9) -> NumberIn:
    """An integer of this range."""
    return NumberIn(int, Range(least=least, most=most))


def number(least: float, most: float, special: float | None = None) -> NumberIn:
    """A number from `least` to `most`, or `special`."""
    return NumberIn(float, Range(least=least, most=most, special=special))


def folder_path(text: str) -> Path:
    """An argparse type: the path of a folder that can be created; `~` is the user's home, as in the path of a source."""
    path = os.path.expanduser(text)
    if wrong := path_problem(path):
        raise argparse.ArgumentTypeError(f"{shown(text)} {wrong}")
    return Path(path)


def ending_in(suffix: str) -> Callable[[str], Path]:
    """An argparse type: a file to write whose name ends in `suffix`; its folder is created if missing."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix:
            raise argparse.ArgumentTypeError(f"{text!r} should end in {suffix}")
        return path

    return parse


page_path = ending_in(".html")
