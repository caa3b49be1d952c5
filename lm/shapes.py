"""Shapes of JSON values that stored files have: which fields, of which types, so that a reader meets no other value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shape = Any
"""A predicate; a tuple, one of whose shapes a value has; a list of one shape, that of all its items; or a dict of shapes by field.

A field whose name ends with `?` may be missing, and `*` is the shape of all other fields, which may be anything without it.
"""
LARGEST = 1e100
"""Of a number: the square of a larger one would overflow. Numbers of float32 are below 1e39."""


def misfit(value: Any, shape: Shape, name: str = "") -> str:
    """Dotted name of the first part of a value that lacks its shape, "." for the value itself; "" if it has its shape."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, name) for one in shape]
        return "" if "" in found else found[0]
    if isinstance(shape, list):
        parts = [(item, shape[0], str(place)) for place, item in enumerate(value)] if isinstance(value, list) else None
    elif isinstance(shape, dict):
        parts = _fields(value, shape) if isinstance(value, dict) else None
    else:
        parts = [] if shape(value) else None
    if parts is None:
        return name or "."
    return next(filter(None, (misfit(item, kind, f"{name}.{part}".lstrip(".")) for item, kind, part in parts)), "")


def _fields(value: dict[str, Any], shape: dict[str, Shape]) -> list[tuple[Any, Shape, str]]:
    named = {name.removesuffix("?"): kind for name, kind in shape.items() if name != "*"}
    own = [(value.get(name, _MISSING), kind, name) for name, kind in named.items() if name in value or name in shape]
    return own + [(item, shape["*"], name) for name, item in value.items() if "*" in shape and name not in named]


_MISSING = object()


def is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (isinstance(value, float) and abs(value) <= LARGEST)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_none(value: Any) -> bool:
    return value is None


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def anything(value: Any) -> bool:
    return value is not _MISSING


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


def list_of(count: int, shape: Shape) -> Callable[[Any], bool]:
    """The shape of a list of so many items."""
    return lambda value: isinstance(value, list) and len(value) == count and not misfit(value, [shape])
