"""TensorBoard: event files in each stage's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from lm.train.sinks.sink import Numbers, Sink, Target


class EventFiles:
    """Scalars in `stages/STAGE/tensorboard/`, by their step in the stage."""

    run = ""

    def __init__(self, target: Target):
        self.target = target
        self.where = f"tensorboard --logdir {target.folder / 'stages'}"
        self._writers: dict[str, Any] = {}

    def send(self, lines: Sequence[Numbers]) -> None:
        for line in lines:
            writer = self._writers.get(line.stage) or self._open(line)
            prefix = "train/" if line.kind == "metrics" else ""
            for name, value in line.values.items():
                writer.add_scalar(f"{prefix}{name}", value, line.step)

    def _open(self, line: Numbers) -> Any:
        """The writer of a stage. Its first line tells where the stage goes on: later events of earlier sessions no longer count."""
        folder: Path = self.target.folder / "stages" / line.stage / "tensorboard"
        begun = len(list(folder.glob("*")))
        purged = line.step if line.kind == "metrics" else line.step + 1 if line.step else None
        # Of the same second and without a suffix, the new file would replace that of the earlier session.
        options = {"purge_step": purged if begun else None, "filename_suffix": f".{begun}"}
        writer = self._writers[line.stage] = SummaryWriter(str(folder), **options)
        if not begun:
            writer.add_text("experiment", f"```\n{json.dumps(self.target.config, indent=1, ensure_ascii=False)}\n```")
        return writer

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def open_sink(target: Target) -> Sink:
    return EventFiles(target)
