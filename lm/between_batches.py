"""A check that long measurements call between two batches, so that a signal ends an evaluation soon."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_check: contextvars.ContextVar[Callable[[], None]] = contextvars.ContextVar("between batches")


@contextlib.contextmanager
def calling_between_batches(check: Callable[[], None]) -> Iterator[None]:
    """Context in which measurements call `check` before each batch, and samplers every few tokens; an error it raises ends them."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def between_batches() -> None:
    """Call the function set by `calling_between_batches`, in every process at the same points."""
    _check.get(lambda: None)()
