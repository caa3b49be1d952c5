"""Sends a run's numbers to its sinks, each in a thread of its own, from the lines that are in the run's files.

The files are the truth. A sink gets every line of metrics.jsonl, eval.jsonl and benchmarks.jsonl once, in their order; how many it
has is in `sinks/NAME.json`. After a rewind it gets the lines that are written anew. No error of a sink reaches training:
it is printed once, and the sink gets nothing more until the run is resumed, or sent by `lm runs send`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.experiment import Experiment, UserError, from_dict
from lm.extras import install_command
from lm.shapes import is_count, is_text
from lm.stored import read_record, write_sealed
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder
from lm.train.sinks.sink import Numbers, Opener, Sink, Target, numbers_of, without_secrets


@dataclass(frozen=True)
class SinkKind:
    """A kind of sink: the module of this folder that opens it, the library that it needs, and the extra that installs that."""

    module: str
    library: str
    extra: str

    def open(self, target: Target) -> Sink:
        """Open the sink. Raises UserError if its library is not installed, and whatever the library raises."""
        if importlib.util.find_spec(self.library) is None:
            raise UserError(f"{self.library} is not installed: {install_command(self.extra)}")
        opener: Opener = importlib.import_module(f"lm.train.sinks.{self.module}").open_sink
        return opener(target)


SINKS = {
    "tensorboard": SinkKind("tensorboard", "tensorboardX", "tensorboard"),
    "wandb": SinkKind("wandb", "wandb", "wandb"),
    "trackio": SinkKind("trackio", "trackio", "trackio"),
    "mlflow": SinkKind("mlflow", "mlflow", "mlflow"),
}
RECORD = {"run": is_text, "sent": {"*": {"*": is_count}}}
KINDS = ("metrics", "eval", "benchmarks")
STORE_SECONDS = 5.0  # between two writes of how much has been sent
PATIENCE_SECONDS = 30.0  # for what is left to send when a run ends
AT_ONCE = 1000  # lines sent together
MOST_WAITING = 10_000  # lines in memory that a slow sink has yet to take; further ones are read from the files again

Written = tuple[str, str, dict[str, Any] | None]  # (stage, kind, line), or None for lines that are only in the file


class SinkFeed:
    """Sends lines to one sink in a thread of its own.

    Args:
        folder: the run's folder, whose files of finished stages are sent first if the sink lacks them.
        tell: called with a text for the user: where the run is shown, or once the error that ended the sink.
    """

    def __init__(self, name: str, folder: RunFolder, experiment: Experiment, tell: Callable[[str], None]):
        self.name, self.folder, self.experiment, self.tell = name, folder, experiment, tell
        self.record = folder.path / "sinks" / f"{name}.json"
        self.error: Exception | None = None
        self.total = 0  # lines sent in this session
        self._queue: queue.SimpleQueue[Written | None] = queue.SimpleQueue()
        steps = [stage.steps for stage in experiment.stages]
        self._before = {stage.name: sum(steps[:i]) for i, stage in enumerate(experiment.stages)}
        self._sent: dict[str, dict[str, int]] = {}  # lines of each stage's files that the sink has
        self._skipping: set[tuple[str, str]] = set()  # (stage, kind) whose last line is only in the file
        self._seen: set[tuple[str, str]] = set()  # (stage, kind) of which the sink has all lines of earlier sessions
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, stage: str, kind: str, line: dict[str, Any]) -> None:
        """Send a line that has been written to the stage's file, soon."""
        if kind not in KINDS or self.error is not None:
            return
        if self._queue.qsize() < MOST_WAITING:
            self._skipping.discard((stage, kind))
            self._queue.put((stage, kind, line))
        elif (stage, kind) not in self._skipping:
            self._skipping.add((stage, kind))
            self._queue.put((stage, kind, None))

    def close(self, patience: float | None) -> None:
        """Send all lines that the sink lacks, and close it. Waits at most `patience` seconds; None: as long as it takes."""
        self._queue.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self.tell(
                f"sink {self.name}: not all was sent within {patience:g} s: `lm runs send {self.folder.path} --sinks "
                f"{self.name}` sends the rest"
            )

    def _run(self) -> None:
        try:
            sink = self._open()
            self._catch_up(sink, lambda stage: self.folder.finished(stage))
            while self._forward(sink):
                pass
            self._catch_up(sink, lambda stage: True)
            self._store(sink)
            sink.close()
        except Exception as error:  # of a library, a server or a disk: none of them may end a run
            self.error = error
            self.tell(f"sink {self.name}: {told(error)}; the run goes on without it")

    def _open(self) -> Sink:
        known = read_record(self.record, RECORD) if self.record.exists() else {}
        self._sent = known.get("sent", {})
        self.record.parent.mkdir(exist_ok=True)
        sink = SINKS[self.name].open(Target(self.folder.path, self.experiment, known.get("run", "")))
        self._store(sink)  # before the first line, so that a kill leaves one run in the sink
        self.tell(f"sink {self.name}: {without_secrets(sink.where)}")
        return sink

    def _forward(self, sink: Sink) -> bool:
        """Send lines for some seconds; returns whether there will be more."""
        until, open_ = time.monotonic() + STORE_SECONDS, True
        while open_ and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                waiting = [self._queue.get(timeout=left)]
                while not self._queue.empty() and len(waiting) < AT_ONCE:
                    waiting.append(self._queue.get())
                open_ = None not in waiting
                self._send(sink, [one for written in waiting if written is not None for one in self._due(*written)])
        self._store(sink)
        return open_

    def _due(self, stage: str, kind: str, line: dict[str, Any] | None) -> list[Numbers]:
        """What to send for a new line: itself; and before a stage's first in this session those that the sink lacks."""
        if line is None:
            self._seen.discard((stage, kind))
            return []
        sent = self._sent.setdefault(stage, {})
        lines = [line]
        if (stage, kind) not in self._seen:
            self._seen.add((stage, kind))
            lines = read_lines(self._path(stage, kind))
            place = max((i for i, one in enumerate(lines) if one == line), default=len(lines) - 1)
            sent[kind] = min(sent.get(kind, 0), place)  # the file was rewound if the sink has had more
            lines = lines[sent[kind] : place + 1]
        sent[kind] += len(lines)
        return [numbers_of(stage, kind, one, self._before[stage]) for one in lines]

    def _catch_up(self, sink: Sink, chosen: Callable[[str], bool]) -> None:
        """Send the lines of earlier sessions, of the chosen stages, that the sink lacks."""
        for stage in filter(chosen, self._before):
            for kind in KINDS:
                sent = self._sent.setdefault(stage, {})
                if (stage, kind) not in self._seen and (lines := read_lines(self._path(stage, kind))):
                    new = lines[sent.get(kind, 0) :]
                    self._send(sink, [numbers_of(stage, kind, one, self._before[stage]) for one in new])
                    sent[kind] = len(lines)

    def _send(self, sink: Sink, lines: Sequence[Numbers]) -> None:
        for start in range(0, len(lines), AT_ONCE):
            sink.send(lines[start : start + AT_ONCE])
        self.total += len(lines)

    def _store(self, sink: Sink) -> None:
        sink.flush()
        write_sealed(self.record, {"run": sink.run, "sent": self._sent})

    def _path(self, stage: str, kind: str) -> Path:
        return self.folder.stage_folder(stage) / f"{kind}.jsonl"


def told(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{without_secrets(' '.join(str(error).split())) or type(error).__name__:.300}"


@contextlib.contextmanager
def feeding(
    experiment: Experiment, folder: RunFolder, tell: Callable[[str], None], patience: float | None = PATIENCE_SECONDS
) -> Iterator[list[SinkFeed]]:
    """Feeds of the experiment's sinks, closed when the context ends."""
    feeds = [SinkFeed(name, folder, experiment, tell) for name in dict.fromkeys(experiment.sinks)]
    try:
        yield feeds
    finally:
        for feed in feeds:
            feed.close(patience)


def send_run(folder: RunFolder, names: Sequence[str]) -> dict[str, int]:
    """Send everything that sinks lack of a run which no process trains; returns the number of lines sent to each.

    Raises:
        UserError: a process uses the run, or a sink took not all.
    """
    experiment = from_dict(folder.read_experiment())
    with folder.lock(), feeding(replace(experiment, sinks=tuple(names)), folder, lambda text: None, None) as feeds:
        pass
    failed = [f"sink {feed.name}: {told(feed.error)}" for feed in feeds if feed.error is not None]
    if failed:
        raise UserError(*failed)
    return {feed.name: feed.total for feed in feeds}
