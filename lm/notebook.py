"""One line of a notebook's output that is written over, where other outputs would get line after line."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

EVERY_SECONDS = 0.5


class NotebookLine:
    """A line of text in the output of the current cell."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = -EVERY_SECONDS

    def show(self, text: str, now: bool = False) -> None:
        """Replace the line, at most twice a second unless it has to be `now`."""
        if not now and time.monotonic() - self._shown < EVERY_SECONDS:
            return
        self._shown = time.monotonic()
        content = {"text/plain": text}
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def notebook_line() -> NotebookLine | None:
    """A new line, if this process is the kernel of a notebook; else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return NotebookLine() if getattr(shell, "kernel", None) is not None else None
