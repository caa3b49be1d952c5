"""Fields of an experiment's dataclasses: knobs with help text and range, and strict validation of values against them.

Imports nothing slow, and of lm only the former names of fields, so that `lm --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lm.config.former import current_names, current_value

MAX_NAME = 64
LONGEST_VALUE = 200  # characters of a value in an error
LONGEST_LINE = 1000  # characters of a line of an error
# a value in quotes, or a word, that is longer than LONGEST_VALUE
_LONG = re.compile(
    rf"(?<![^\s(\[{{=,:])(?P<quote>['\"])(?P<value>(?:(?!(?P=quote))[^\\]|\\.){{{LONGEST_VALUE + 1},}})(?P=quote)(?!\w)"
    rf"|\S{{{LONGEST_VALUE + 1},}}",
    re.DOTALL,
)


class UserError(Exception):
    """Something the user can put right. The command line prints its one line (and `more`, a list) and exits with 2."""

    def __init__(self, message: object = "", *more: object):
        super().__init__("\n".join(message_line(str(line)) for line in (message, *more)))


def message_line(text: str) -> str:
    """The text in one line: long values end with …, long paths have it in their middle, control characters are escaped."""
    line = one_line(_LONG.sub(_cut, " ".join(text.splitlines())))
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"


def one_line(text: str) -> str:
    """The text with control characters and line ends escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _cut(match: re.Match[str]) -> str:
    if match["quote"]:
        return f"{match['quote']}{match['value'][:LONGEST_VALUE]}…{match['quote']}"
    word, half = match[0], LONGEST_VALUE // 2
    return f"{word[:half]}…{word[-half:]}" if "/" in word else f"{word[:LONGEST_VALUE]}…"


@dataclass(frozen=True)
class Range:
    """Range of a numeric field: inclusive bounds (least, most), exclusive bounds (above, below), and one extra value `special`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    special: float | None = None

    def __contains__(self, value: Any) -> bool:
        if self.special is not None and value == self.special:
            return True
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range in words, to follow "an integer" or "a number": `from 0 to 1`, `above 0 and at most 100, or -1`."""
        ends = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = " and ".join(f"{word} {plain(end)}" for word, end in ends.items() if end is not None)
        if self.least is not None and self.most is not None:
            words = f"from {plain(self.least)} to {plain(self.most)}"
        return words if self.special is None else f"{words}, or {plain(self.special)}"


def knob(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    special: float | None = None,
    name: bool = False,
    affects_training: bool = True,
) -> Any:
    """A dataclass field with the help text that the command line shows and the range of its values.

    Every number has a range, and in a tuple every element: `least` and `most` are inclusive, `above` and `below` exclusive,
    `special` is one further value, such as a 0 or -1 that disables something.

    Args:
        name: the text becomes a folder or column name and must satisfy `is_name`.
        affects_training: a run cannot be resumed with another value of this field.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below, "special": special}
    given = any(bound is not None for bound in bounds.values())
    metadata = {"help": help, "range": Range(**bounds) if given else None, "name": name}
    metadata |= {"affects_training": affects_training}
    return field(default=default, metadata=metadata)


def is_name(text: str) -> bool:
    """Whether a text is a valid name of a stage, run, eval or sweep, which become folders, files and dotted names."""
    return len(text) <= MAX_NAME and re.fullmatch(r"[^\W_](?:[\w.-]*[\w-])?", text, re.ASCII) is not None


NAME_RULE = f"a name: letters a to z, digits, '.', '_' and '-', a letter or digit first, no '.' last, at most {MAX_NAME} characters"


def check_name(text: str, where: str) -> str:
    """Return a text that is a valid name; raise UserError, naming the field `where`, if it is not."""
    if not is_name(text):
        raise UserError(f"{where} is {shown(text)}; it should be {NAME_RULE}")
    return text


# ---- strict validation of a value --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Options of `read`: `plain`, dataclasses are given as JSON objects; `names`, names are checked by `is_name`."""

    plain: bool
    names: bool


def read(value: Any, kind: Any, where: str, reading: Reading, metadata: Any = types.MappingProxyType({})) -> Any:
    """Validate a value against type `kind` and return it; every leaf must have its field's type and range.

    Lists become tuples, and NumPy scalars become Python numbers.

    Raises:
        UserError: a leaf is invalid; gives its dotted name, its value, and what would be valid.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        kinds = [member for member in args if member is not type(None)]
        if len(kinds) > 1:
            return _read_one_of(value, kinds, where, reading)
        return None if value is None else read(value, kinds[0], where, reading, metadata)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(value, kind, where, reading)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {shown(value)}; it should be a list of {_members(args[0])}")
        return tuple(read(item, args[0], _member(where, i, item), reading, metadata) for i, item in enumerate(value))
    return _read_leaf(value, kind, where, reading, metadata)


def _read_one_of(value: Any, kinds: list[Any], where: str, reading: Reading) -> Any:
    """Read a value of one of several dataclasses: an instance in Python; in JSON an object whose `kind` is the class name."""
    names = {kind.__name__: kind for kind in kinds}
    if not reading.plain:
        if type(value) not in kinds:
            raise UserError(
                f"{where} is {shown(value)}; it should be one of {', '.join(f'{name}()' for name in names)}"
            )
        return _read_dataclass(value, type(value), where, reading)
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shown(value)}; it should be an object with kind one of {', '.join(names)}")
    name = value.get("kind")
    if not isinstance(name, str) or name not in names:
        raise UserError(f"{where}.kind is {shown(name)}; there are {', '.join(names)}")
    return _read_dataclass({k: v for k, v in value.items() if k != "kind"}, names[name], where, reading)


def _read_dataclass(value: Any, kind: Any, where: str, reading: Reading) -> Any:
    """Read a dataclass field by field; a field that a JSON object lacks has its default."""
    hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    here = where or kind.__name__.lower()
    if reading.plain:
        if not isinstance(value, dict):
            raise UserError(f"{here} is {shown(value)}; it should be an object with the fields of {kind.__name__}")
        value = current_names(value, fields, here)
        unknown = sorted(str(name) for name in value if name not in fields)
        if unknown:
            raise UserError(f"{here} has no field {shown(unknown[0])}{nearest(unknown[0], fields)}")
        missing = sorted(name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in value)
        if missing:
            raise UserError(f"{here} lacks the field {missing[0]!r}")
        members = value
    else:
        if type(value) is not kind:
            raise UserError(f"{here} is {shown(value)}; it should be a value of {kind.__name__}")
        members = {name: getattr(value, name) for name in fields}
    inside = {name: f"{where}.{name}".lstrip(".") for name in members}
    members = {name: current_value(name, member, inside[name]) for name, member in members.items()}
    return kind(**{k: read(v, hints[k], inside[k], reading, fields[k].metadata) for k, v in members.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields, where a type variable is replaced by its bound."""
    return {
        name: hint.__bound__ if isinstance(hint, typing.TypeVar) else hint
        for name, hint in typing.get_type_hints(kind).items()
    }


def _member(where: str, number: int, item: Any) -> str:
    """Dotted name of a list element, as in `flatten`: by its name, if it has one, else by its index; stages are at the top level."""
    name = item.get("name") if isinstance(item, dict) else getattr(item, "name", None)
    inside = name if isinstance(name, str) and is_name(name) else str(number)
    return inside if where == "stages" and inside is name else f"{where}.{inside}"


def _read_leaf(value: Any, kind: Any, where: str, reading: Reading, metadata: Any) -> Any:
    span = metadata.get("range")
    leaf = _as_python(value, kind)
    taken = leaf is not None
    if taken and isinstance(leaf, str) and kind is str:
        if metadata.get("name") and reading.names:
            return check_name(leaf, where)
        taken = is_text(leaf)
    elif taken and span is not None:
        taken = leaf in span
    elif taken and kind is float:
        taken = math.isfinite(leaf)
    if not taken:
        wanted = NAME_RULE if metadata.get("name") else describe(kind, span)
        if isinstance(leaf, str) and kind is str:
            wanted = "text without null characters and lone surrogates"
        raise UserError(f"{where} is {shown(value)}; it should be {wanted}")
    return leaf


def _as_python(value: Any, kind: Any) -> Any:
    """The value as a plain Python value of the type, or None if it has another type; a bool is not a number."""
    if typing.get_origin(kind) is Literal:
        names = typing.get_args(kind)
        return str(value) if isinstance(value, str) and (value in names or takes_function(value, names)) else None
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        return str(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) else None
    try:
        return float(value)
    except OverflowError:
        return None


def is_text(text: str) -> bool:
    """Whether a text can be written to a file: it has no null character and no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


FUNCTION = "FILE:FUNCTION"
"""Marks a Literal field that also takes a function of the user's own, such as `my_file:loss`."""


def takes_function(value: Any, names: tuple[Any, ...]) -> bool:
    """Whether a value names a function of the user's own, in a Literal field that allows one."""
    return FUNCTION in names and isinstance(value, str) and ":" in value


# Verifiers and environments whose name may be followed by `:` and a parameter, as in regex:PATTERN. A file of such a name is
# regex.py:FUNCTION.
WITH_PARAMETER = (
    "regex",
    "json_schema",
    "format",
    "language",
    "overlong",
    "python_tests",
    "endpoint",
    "gym",
    "search",
)
WITH_FILE = ("json_schema", "endpoint", "search")
"""Those of them whose parameter is a file."""


def is_function_name(name: Any) -> bool:
    """Whether a field's value names a function of the user's own, FILE:FUNCTION."""
    return isinstance(name, str) and ":" in name and name.partition(":")[0] not in WITH_PARAMETER


# ---- in words ----------------------------------------------------------------------------------------------------


def plain(number: float) -> str:
    """A bound as text: 1, 0.5, 1e-06."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def shown(value: Any, width: int = 80) -> str:
    """A value as short text in an error message, shortened to `width` characters."""
    try:
        text = repr(value)
    except Exception:  # more digits than Python writes, or a __repr__ of the user's own, whatever that raises
        text = f"a {type(value).__name__} that cannot be shown"
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 20]} … ({len(text)} characters)"


def describe(kind: Any, span: Range | None = None) -> str:
    """A field's type and range in words, such as "an integer from 0 to 10"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is types.UnionType:
        return f"{describe(args[0], span)} or none"
    if origin is tuple:
        return f"a list of {_members(args[0])}" + (f" {span}" if span else "")
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}.get(kind, str(kind))
    return f"{words.replace('finite ', '')} {span}" if span else words


def _members(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "names among " + ", ".join(map(str, typing.get_args(kind)))
    return {int: "integers", float: "numbers", str: "texts"}.get(kind, getattr(kind, "__name__", str(kind)))


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean …' with up to three similar names, or names with the same last part; empty if there are none."""
    names = list(names)
    last = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close += [n for n in names if n.rsplit(".", 1)[-1] == last and n not in close]
    return f"; did you mean {', '.join(close[:3])}?" if close else ""


# ---- plain JSON values ------------------------------------------------------------------------------------------


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a plain JSON value by dotted name; list elements are named by their `name`, if they have one.

    Stages are at the top level, as on the command line: `sft.steps`.
    """
    if isinstance(value, dict):
        members: list[tuple[str, Any]] = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        members = [(str(item.get("name", i)), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, item in members:
        inside = prefix if prefix == "" and name == "stages" else f"{prefix}.{name}".lstrip(".")
        leaves |= flatten(item, inside)
    return leaves


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every leaf that differs between two plain JSON values."""
    before, after = flatten(old), flatten(new)
    return [(k, before.get(k), after.get(k)) for k in {**before, **after} if before.get(k) != after.get(k)]
