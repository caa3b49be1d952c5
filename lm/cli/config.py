"""Show the resolved value of an experiment.

All its values by their dotted names, as they are or with your changes:

  lm config quickstart
  lm config quickstart --sft.steps 200
  lm config quickstart --help              every knob with its type and help
  lm config --presets                      named members of the GRPO family
  lm config quickstart --reason.objective.preset dapo     one of them"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from lm import experiment as experiments
from lm.cli.arguments import EXPERIMENT_HELP, resolve
from lm.config.presets import PRESETS
from lm.experiment import Experiment, UserError
from lm.files import load
from lm.overrides import knobs, override

TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm config [EXPERIMENT] [--presets] [--json] [--help] [--a.b.c VALUE ...]"
    # --help goes through `call`, which knows the knobs of the experiment.
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this, and the knobs of EXPERIMENT if it is named"
    )
    parser.set_defaults(show_help=parser.print_help)
    parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help=EXPERIMENT_HELP)
    parser.add_argument("--presets", action="store_true", help="show the named members of the GRPO family")
    parser.add_argument("--json", action="store_true", help="as JSON, as it is saved in a run's experiment.json")


def call(arguments: argparse.Namespace) -> int:
    if arguments.help:
        arguments.show_help()
        if arguments.experiment:
            print(f"\nknobs of {arguments.experiment}:\n")
            print(knob_help(override(load(arguments.experiment), arguments.overrides)))
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


def knob_help(experiment: Experiment, width: int = 80) -> str:
    """Help text of every knob: flag, value, help and type."""
    lines = []
    for knob in knobs(experiment):
        flag = f"--{knob.name} {as_typed(knob.value)}"
        about = f"{knob.help} ({knob.type})" if knob.help else knob.type
        lines += textwrap.wrap(
            flag, width, subsequent_indent="        ", break_long_words=False, break_on_hyphens=False
        )
        lines += textwrap.wrap(about, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def as_typed(value: Any) -> str:
    """Format a value as the command line takes it."""
    if isinstance(value, str):
        return value or '""'
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
