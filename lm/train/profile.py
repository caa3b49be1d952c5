"""Profiler traces of chosen steps, for xprof or Perfetto."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from lm.experiment import UserError


def parse_steps(text: str) -> tuple[int, int]:
    """Parse FIRST:END, such as `10:13` for the steps 10, 11 and 12, counted from 1 as in the metrics.

    Raises:
        UserError: it is not two numbers, the first at least 1 and less than the second.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, end = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < end:
        raise UserError(
            f"--profile is {text!r}; it should be FIRST:END, for instance 10:13 for the steps 10, 11 and 12"
        )
    return first, end


class Trace:
    """Profiles the steps `(first, end)`, end excluded, into a folder; does nothing if `steps` is None.

    The folder then has plugins/profile/DATE/*.xplane.pb (xprof, TensorBoard) and *.trace.json.gz (Perfetto).
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder, self.steps, self.active = folder, steps, False

    def before(self, step: int) -> None:
        """Start the trace if `step` is the first to be traced."""
        if self.steps is not None and self.steps[0] <= step < self.steps[1] and not self.active:
            jax.profiler.start_trace(str(self.folder))
            self.active = True

    def after(self, step: int, result: Any) -> None:
        """Stop the trace if `step` was the last to be traced, after waiting for its `result` on the devices."""
        if self.steps is not None and self.active and step + 1 >= self.steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Stop and write a trace that has started."""
        if self.active:
            self.active = False
            jax.profiler.stop_trace()
