"""Conversion of an experiment to and from plain JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.config.experiment import Experiment
from lm.config.field import Reading, read
from lm.config.objectives import OBJECTIVES


def to_dict(value: Any) -> Any:
    """An experiment as a plain JSON value; an objective has its class name as `kind`."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields} if type(value) in OBJECTIVES.values() else fields
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def from_dict(value: Any, kind: Any = Experiment, where: str = "") -> Any:
    """The inverse of `to_dict`; absent fields have their defaults.

    Raises:
        UserError: a field is missing, unknown, of the wrong type or out of range; names the field.
    """
    return read(value, kind, where, Reading(plain=True, names=False))


def strict(experiment: Any) -> Experiment:
    """Validate an experiment built in Python as strictly as one from JSON; lists become tuples, NumPy scalars numbers.

    Raises:
        UserError: a value has the wrong type or is out of range, or a name is invalid; names the field.
    """
    return read(experiment, Experiment, "", Reading(plain=False, names=True))
