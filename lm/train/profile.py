"""A trace of some steps, for xprof or Perfetto: what the devices and this process did, and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from lm.experiment import UserError


def parse_steps(text: str) -> tuple[int, int]:
    """`10:13` as (10, 13): steps 10, 11 and 12, counted from 1 as the metrics are.

    Raises:
        UserError: it is not two numbers, the first at least 1 and below the second.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, end = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < end:
        raise UserError(
            f"--profile is {text!r}; it should be FIRST:END, for instance 10:13 for the steps 10, 11 and 12"
        )
    return first, end


class Trace:
    """Traces the steps from `first` to before `end` into `folder`; nothing where `steps` is None.

    The folder then has plugins/profile/DATE/*.xplane.pb (xprof, TensorBoard) and *.trace.json.gz (Perfetto).
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder, self.steps, self.active = folder, steps, False

    def before(self, step: int) -> None:
        """Begin, if `step` is the first to be traced."""
        if self.steps is not None and self.steps[0] <= step < self.steps[1] and not self.active:
            jax.profiler.start_trace(str(self.folder))
            self.active = True

    def after(self, step: int, result: Any) -> None:
        """End, if `step` was the last to be traced, when the devices have its result."""
        if self.steps is not None and self.active and step + 1 >= self.steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what there is, if a trace has begun."""
        if self.active:
            self.active = False
            jax.profiler.stop_trace()
