"""Command-line overrides: the knobs of an experiment by dotted name, and the experiment with some of them replaced."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lm.config.field import shown
from lm.config.former import current_path, current_value
from lm.config.presets import PRESETS, apply_preset
from lm.experiment import (
    Experiment,
    UserError,
    describe,
    from_dict,
    nearest,
    resolve_sources,
    takes_function,
    to_dict,
)


@dataclass(frozen=True)
class Knob:
    """A field of an experiment that the command line can override: dotted name, type in words, value, help and default.

    `default` is dataclasses.MISSING where a file has to give the value.
    """

    name: str
    type: str
    value: Any
    help: str
    default: Any


def knobs(experiment: Experiment) -> list[Knob]:
    """All knobs of an experiment, in the order of the dataclasses."""
    return [
        Knob(name, describe(kind, metadata.get("range")), value, metadata.get("help", ""), metadata["default"])
        for name, (_, kind, value, metadata) in _leaves(experiment).items()
    ]


def override(experiment: Experiment, arguments: list[str]) -> Experiment:
    """Apply command-line overrides, `--a.b.c VALUE`, `--a.b.c=VALUE` or `--STAGE.objective.preset NAME`, to an experiment.

    Raises:
        UserError: a knob does not exist (names similar ones), or its value is missing or has the wrong type.
    """
    leaves = _leaves(experiment)
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        flag = words.pop(0)
        name = current_path(flag.removeprefix("--").replace("-", "_"))
        stage = next((one for one in experiment.stages if name == f"{one.name}.objective.preset"), None)
        if stage and not words:
            raise UserError(f"{flag} needs a value: one of {', '.join(PRESETS)}")
        if stage:
            changed = dataclasses.replace(stage, objective=apply_preset(stage.objective, words.pop(0), name))
            stages = tuple(changed if one is stage else one for one in experiment.stages)
            experiment = dataclasses.replace(experiment, stages=stages)
            continue
        if not flag.startswith("--") or name not in leaves:
            raise UserError(f"no knob {flag!r}{nearest(name, leaves)} (`lm config EXPERIMENT --help` lists all)")
        if not words:
            raise UserError(f"{flag} needs a value: {describe(leaves[name][1], leaves[name][3].get('range'))}")
        path, kind, _, metadata = leaves[name]
        text = words.pop(0)
        try:
            value = _parse(text, kind)
        except (ValueError, KeyError, OverflowError, RecursionError):
            wanted = describe(kind, metadata.get("range"))
            raise UserError(f"{flag} is {shown(text)}; it should be {wanted}") from None
        experiment = _replace(experiment, path, current_value(path[-1], value, flag))
    return resolve_sources(experiment)


def overridden(arguments: list[str]) -> dict[str, str]:
    """Text of each override by the dotted name of its knob."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {
        flag.removeprefix("--").replace("-", "_"): text for flag, text in zip(words[::2], words[1::2], strict=False)
    }


def replaced(experiment: Experiment, name: str, value: Any) -> Experiment:
    """The experiment with one field, given by its dotted name, replaced; `stage:NAME` sources are not resolved.

    Raises:
        UserError: no such field (names similar ones), or a value of the wrong type.
    """
    name = current_path(name)
    kind, _ = leaf(experiment, name)
    return _replace(experiment, _leaves(experiment)[name][0], from_dict(to_dict(value), kind, name))


def leaf(experiment: Experiment, name: str) -> tuple[Any, Any]:
    """(type, value) of the field with that dotted name; raises UserError with similar names if there is none."""
    leaves, name = _leaves(experiment), current_path(name)
    if name not in leaves:
        raise UserError(f"no field {name!r}{nearest(name, leaves)}")
    return leaves[name][1:3]


def _leaves(value: Any, prefix: str = "", path: tuple = ()) -> dict[str, tuple[tuple, Any, Any, Mapping[str, Any]]]:
    """dotted name → (path, type, value, metadata of its field) for every leaf below a dataclass."""
    found: dict[str, tuple[tuple, Any, Any, Mapping[str, Any]]] = {}
    hints = typing.get_type_hints(type(value))
    for f in dataclasses.fields(value):
        item, name, here = getattr(value, f.name), f"{prefix}{f.name}", (*path, f.name)
        if dataclasses.is_dataclass(item):
            found |= _leaves(item, f"{name}.", here)
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            for i, member in enumerate(item):
                inside = "" if f.name == "stages" else f"{name}."
                found |= _leaves(member, f"{inside}{getattr(member, 'name', i)}.", (*here, i))
        else:
            found[name] = (here, hints[f.name], item, {**f.metadata, "default": f.default})
    return found


def _replace(value: Any, path: tuple, leaf: Any) -> Any:
    if not path:
        return leaf
    if isinstance(value, tuple):
        return tuple(_replace(item, path[1:], leaf) if i == path[0] else item for i, item in enumerate(value))
    return dataclasses.replace(value, **{path[0]: _replace(getattr(value, path[0]), path[1:], leaf)})


def _parse(text: str, kind: Any) -> Any:
    """Parse a command-line text as a type; raises ValueError, KeyError, OverflowError or RecursionError if it cannot."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if text.lower() == "none" else _parse(text, args[0])
    if origin is tuple:
        if text.startswith("["):
            return tuple(_parse(_as_text(item), args[0]) for item in json.loads(text))
        return tuple(_parse(part.strip(), args[0]) for part in text.split(",") if part.strip())
    if kind is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    if kind is int:
        return int(float(text)) if "e" in text.lower() and float(text).is_integer() else int(text)
    if kind is float:
        return float(text)
    if origin is Literal and text not in args and not takes_function(text, args):
        raise ValueError(text)
    return text


def _as_text(item: Any) -> str:
    """An element of a JSON list as command-line text; raises ValueError if it is neither text nor a number."""
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise ValueError(item)
    return str(item)
