"""Values of a config.json: sizes, positive numbers and flags, checked."""

from __future__ import annotations

import math
from typing import Any

from lm.config.field import shown
from lm.experiment import UserError

Plain = dict[str, Any]
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
LARGEST_SIZE = 2**31 - 1


def given(config: Plain, name: str, default: Any) -> Any:
    """A field's value; the default where it is missing or null."""
    value = config.get(name)
    return default if value is None else value


def read_size(config: Plain, name: str) -> int:
    """A whole number of at least 1; 0 for a missing optional field."""
    value = config.get(name)
    if value is None and name in OPTIONAL:
        return 0
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        what = "is missing" if name not in config else f"is {shown(value)}"
        raise UserError(f"{name} {what}; it should be a whole number from 1 to {LARGEST_SIZE}")
    return value


def positive(name: str, value: Any) -> float:
    """A number above 0. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} is {shown(value)}; it should be a number above 0")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name} is {shown(value)}; it is too large") from None


def flag(config: Plain, name: str) -> bool:
    """A field that is true or false; null and absent are false."""
    value = given(config, name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; it should be true or false")
    return value
