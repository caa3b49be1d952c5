"""trackio: a run in the database in TRACKIO_DIR, or in the Space that TRACKIO_SPACE_ID names."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

import trackio

from lm.train.sinks.sink import PROJECT, Numbers, Sink, Target


class LoggedRun:
    """A run of trackio, by the step over all stages."""

    def __init__(self, target: Target):
        self.run = target.known or f"{target.folder.name}-{uuid.uuid4().hex[:4]}"  # its name tells runs apart
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._run = trackio.init(
            project=project,
            name=self.run,
            config=target.config,
            resume="allow",
            embed=False,
            auto_log_cpu=False,  # only what is in the run's files
            auto_log_gpu=False,
        )
        self.where = f"trackio show --project {project}"

    def send(self, lines: Sequence[Numbers]) -> None:
        for line in lines:
            self._run.log(line.named, step=line.total)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def open_sink(target: Target) -> Sink:
    return LoggedRun(target)
