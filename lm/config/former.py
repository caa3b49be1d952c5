"""Former names of fields and values, which experiment files, stored runs and the command line may still use."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

FIELDS = {"sampler_cap": "tis_clip", "scale_advantages": "advantage_scale"}  # former field → field
FLAGS = {"scale_advantages": {True: "group", False: "none"}}  # former field → {its value: value of the new field}
WORDS = {"verifier": {"manners": "style"}}  # field → {former value: value}
PREFIXES = {"path": {"made:": "collected:"}}  # field → {former prefix of its values: prefix}

Kind = TypeVar("Kind", bound=type)


def current_names(fields: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of an object under their current names; `known` are the fields of its class."""
    new = {name: FIELDS[name] for name in fields if FIELDS.get(name) in known and FIELDS[name] not in fields}
    for former, name in new.items():
        _tell(f"{where}.{former} is called {name} now")
    return {new.get(name, name): _of_flag(name, value) for name, value in fields.items()}


def current_path(dotted: str) -> str:
    """The current dotted name of a leaf whose last part may be a former name."""
    start, _, name = dotted.rpartition(".")
    if name not in FIELDS:
        return dotted
    _tell(f"{dotted} is called {FIELDS[name]} now")
    return f"{start}.{FIELDS[name]}"


def current_value(field: str, value: Any, where: str) -> Any:
    """The current spelling of a field's value."""
    new = _swapped(value, WORDS.get(field, {}), PREFIXES.get(field, {}))
    if new is not value:
        _tell(f"{where} {value} is written {new} now")
    return new


def former_name(field: str) -> str:
    """The oldest name of a field, which digests of experiments use so that they do not change."""
    return _inverse(FIELDS).get(field, field)


def former_value(field: str, value: Any) -> Any:
    """The oldest spelling of a field's value, which digests of experiments use so that they do not change."""
    words: dict[Any, Any] = WORDS.get(field, {}) | FLAGS.get(former_name(field), {})
    return _swapped(value, _inverse(words), _inverse(PREFIXES.get(field, {})))


def takes_former_names(kind: Kind) -> Kind:
    """Class decorator: the constructor and `dataclasses.replace` also accept former names of the fields."""
    construct: Callable[..., None] = kind.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def init(self: Any, *values: Any, **fields: Any) -> None:
        for former in fields.keys() & FIELDS.keys():
            _tell(f"{kind.__name__}.{former} is called {FIELDS[former]} now")
            fields[FIELDS[former]] = _of_flag(former, fields.pop(former))
        construct(self, *values, **fields)

    kind.__init__ = init  # type: ignore[misc]
    return kind


def _of_flag(former: str, value: Any) -> Any:
    """The current value of a field that was a flag under its former name."""
    return FLAGS.get(former, {}).get(value, value) if isinstance(value, bool) else value


def _swapped(value: Any, words: Mapping[Any, Any], prefixes: Mapping[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    for old, new in prefixes.items():
        if value.startswith(old):
            return new + value.removeprefix(old)
    return words.get(value, value)


def _inverse(table: Mapping[Any, Any]) -> dict[Any, Any]:
    return {new: old for old, new in table.items()}


@functools.cache
def _tell(line: str) -> None:
    """Print a line to stderr, once per process."""
    print(f"lm: {line}", file=sys.stderr)
