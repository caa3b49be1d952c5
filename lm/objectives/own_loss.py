"""Losses from the user's own files: errors in one line, and results of the right shape."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.config.field import shown
from lm.experiment import Stage, UserError
from lm.user_functions import described, is_function_name, load_function

FIELDS = ("loss", "losses")


def own_loss(name: str, where: str, arguments: str) -> Callable[..., Float[Array, " n"]]:
    """The loss that FILE:FUNCTION names; it gives a number for each element of its first argument, a pair or an answer.

    Args:
        where: the field that names it, for errors.
        arguments: what it is called with, see `load_function`.

    Raises:
        UserError: it cannot be loaded; when it is called: it raises, or gives anything but floating-point numbers of that shape.
    """
    function = load_function(name, where, arguments)
    file = Path(inspect.getsourcefile(inspect.unwrap(function)) or name)

    @functools.wraps(function)
    def checked(first: Float[Array, " n"], *rest: object) -> Float[Array, " n"]:
        try:
            found = function(first, *rest)
        except (Exception, SystemExit) as error:  # what the function does is the user's
            raise UserError(f"{where} is {name!r}; {described(error, file)}") from error
        if not isinstance(found, jax.Array):
            given = f"{shown(found)} ({type(found).__name__})"
        elif found.shape != first.shape or not jnp.issubdtype(found.dtype, jnp.floating):
            given = f"an array of {found.dtype} of shape {found.shape}"
        else:
            return found
        raise UserError(
            f"{where} is {name!r}; {function.__name__} in {file} gives {given}; it should give a jax array of floating-point "
            f"numbers of shape {first.shape}, as its first argument has"
        )

    return checked


def own_losses(stage: Stage) -> list[tuple[str, str]]:
    """(field, FILE:FUNCTION) of every loss of the user's own in a stage."""
    fields = [field for field in FIELDS if field in stage.objective.functions]
    values = {field: getattr(stage.objective, field) for field in fields}
    names = {field: value if isinstance(value, tuple) else (value,) for field, value in values.items()}
    return [(field, name) for field in fields for name in names[field] if is_function_name(name)]


def check_own_losses(stages: Sequence[Stage]) -> None:
    """Raise UserError if a loss of the user's own fails when it is traced for two pairs or answers."""
    for stage in stages:
        for field, name in own_losses(stage):
            _trace(name, stage, field)


def _trace(name: str, stage: Stage, field: str) -> None:
    arguments = stage.objective.functions[field]
    loss, names = own_loss(name, f"{stage.name}.objective.{field}", arguments), arguments.split(", ")
    shapes = [() if argument == "baseline" else (2,) for argument in names if argument != "knobs"]
    knobs = [stage.objective] * ("knobs" in names)
    jax.eval_shape(lambda *given: loss(*given, *knobs), *(jax.ShapeDtypeStruct(one, jnp.float32) for one in shapes))
