"""User callbacks, called with every line of metrics, evaluations and samples that a run writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.experiment import UserError
from lm.user_functions import described, load_function

ARGUMENTS = "stage, kind, line"


@dataclass(frozen=True)
class Callback:
    """A user's function, called with (stage, kind, line), and its FILE:FUNCTION name.

    `kind` is metrics, eval, samples or warnings, and `line` the line written to that file; when a stage is finished,
    `kind` is summary and `line` the content of summary.json.
    """

    name: str
    function: Callable[[str, str, dict[str, Any]], Any]

    def __call__(self, stage: str, kind: str, line: dict[str, Any]) -> None:
        """Call the function. Raises UserError with file and line number if it raises."""
        try:
            self.function(stage, kind, dict(line))
        except (Exception, SystemExit) as error:
            file = Path(self.function.__code__.co_filename) if hasattr(self.function, "__code__") else Path(self.name)
            raise UserError(
                f"the callback {self.name} failed on {kind} of stage {stage}: {described(error, file)}; without it the "
                "same command resumes from the last checkpoint"
            ) from error


def load_callbacks(names: Sequence[str]) -> tuple[Callback, ...]:
    """Load callbacks by FILE:FUNCTION. Raises UserError where one cannot be loaded."""
    return tuple(Callback(name, load_function(name, "--callback", ARGUMENTS)) for name in names)


def listener(callbacks: Sequence[Callback], stage: str) -> Callable[[str, dict[str, Any]], None]:
    """The function (kind, line) that a stage's log calls, which passes lines on to all callbacks."""

    def tell(kind: str, line: dict[str, Any]) -> None:
        for callback in callbacks:
            callback(stage, kind, line)

    return tell
