"""Show the resolved value of an experiment.

All its values by their dotted names, as they are or with your changes:

  lm config quickstart
  lm config quickstart --sft.steps 200
  lm config quickstart --help              every field with its range and help
  lm config quickstart --search warmup     only fields whose name or help has it
  lm config --presets                      named members of the GRPO family
  lm config quickstart --reason.objective.preset dapo     with one of them"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from lm import experiment as experiments
from lm.cli.arguments import EXPERIMENT_HELP, resolve
from lm.config.presets import PRESETS
from lm.experiment import Experiment, UserError, nearest
from lm.files import load
from lm.overrides import Knob, knobs, override

TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm config [EXPERIMENT] [options] [--a.b.c VALUE ...]"
    # --help goes through `call`, which knows the knobs of the experiment.
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this, and the fields of EXPERIMENT if it is named"
    )
    parser.add_argument(
        "--search", metavar="WORDS", help="show the fields of EXPERIMENT that have these words in their name or help"
    )
    parser.set_defaults(show_help=parser.print_help)
    parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help=EXPERIMENT_HELP)
    parser.add_argument("--presets", action="store_true", help="show the named members of the GRPO family")
    parser.add_argument("--json", action="store_true", help="as JSON, as it is saved in a run's experiment.json")


def call(arguments: argparse.Namespace) -> int:
    words = (arguments.search or "").split()
    if arguments.search is not None and not (words and arguments.experiment):
        raise UserError("--search WORDS needs an EXPERIMENT whose fields are searched, and a word")
    if arguments.help and not words:
        arguments.show_help()
    if arguments.experiment and (arguments.help or words):
        text = knob_help(override(load(arguments.experiment), arguments.overrides), words)
        print(text if words else f"\nfields of {arguments.experiment}:\n\n{text}")
    if arguments.help or words:
        return 0
    if arguments.presets:
        print(preset_help())
        return 0
    if not arguments.experiment:
        raise UserError("which EXPERIMENT? (`lm config --help` shows what there is)")
    experiment = resolve(arguments.experiment, arguments.overrides)
    if arguments.json:
        print(json.dumps(experiments.to_dict(experiment), indent=2, ensure_ascii=False))
    else:
        print(listing(load(arguments.experiment), experiment))
    return 0


def listing(base: Experiment, experiment: Experiment) -> str:
    """Lines `name  value` of every leaf, with the former value where an override changed it."""
    leaves = experiments.flatten(experiments.to_dict(experiment))
    changed = {
        name: old for name, old, _ in experiments.diff(experiments.to_dict(base), experiments.to_dict(experiment))
    }
    width = max(map(len, leaves))
    return "\n".join(
        f"{name:<{width}}  {as_typed(value)}" + (f"  (was {as_typed(changed[name])})" if name in changed else "")
        for name, value in leaves.items()
    )


def preset_help(width: int = 80) -> str:
    """Every preset: its name and paper, what its loss maximises, and the fields that it sets."""
    lines = [
        "On the command line --STAGE.objective.preset NAME; in a file\n`from lm.config import presets` and `presets.NAME`."
    ]
    for name, preset in PRESETS.items():
        fields = " ".join(f"{field} {as_typed(value)}" for field, value in preset.fields.items())
        lines += ["", *textwrap.wrap(f"{name}  {preset.paper}", width)]
        for text in (preset.equation, fields or "(the defaults)"):
            lines += textwrap.wrap(
                text, width, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False
            )
    return "\n".join(lines)


def knob_help(experiment: Experiment, words: Sequence[str] = ()) -> str:
    """Help of every field by the part of the experiment: value, what it is, type or range, default.

    Args:
        words: only fields with all of these in their name or help, in capital or small letters.

    Raises:
        UserError: no field has them.
    """
    said = {knob: f"{knob.name} {knob.help} {knob.type}" for knob in knobs(experiment)}
    found = [knob for knob, text in said.items() if all(word.casefold() in text.casefold() for word in words)]
    if not found:
        near = nearest(words[0], {word for text in said.values() for word in re.findall(r"\w+", text)})
        raise UserError(f"no field of {experiment.name} has {' '.join(words)} in its name or help{near}")
    parts: dict[str, list[str]] = {}
    for knob in found:
        parts.setdefault(knob.name.rpartition(".")[0], []).extend(_help_lines(knob))
    stages = experiments.to_dict(experiment)["stages"]
    titles = {stage["name"]: f", stage of {stage['objective']['kind']}" for stage in stages}
    blocks = [[f"== {part or 'the experiment'}{titles.get(part, '')} ==", *lines] for part, lines in parts.items()]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _help_lines(knob: Knob, width: int = 80) -> list[str]:
    default = "" if knob.default is dataclasses.MISSING else f"; default {as_typed(knob.default)}"
    about = f"{knob.help} ({knob.type}{default})" if knob.help else f"{knob.type}{default}"
    flag = f"--{knob.name} {as_typed(knob.value)}"
    return [
        *textwrap.wrap(flag, width, subsequent_indent="        ", break_long_words=False, break_on_hyphens=False),
        *textwrap.wrap(about, width, initial_indent="      ", subsequent_indent="      "),
    ]


def as_typed(value: Any) -> str:
    """Format a value as the command line takes it."""
    if isinstance(value, str):
        return value or '""'
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
