"""Logs of a stage: JSON-lines files, and the progress line on the terminal."""

from __future__ import annotations

import itertools
import json
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.experiment import UserError
from lm.json_lines import JsonLines, checksums, read_json_lines, rewrite_json_lines
from lm.notebook import notebook_line

KINDS = ("metrics", "eval", "samples", "warnings")
FIELDS: dict[str, dict[str, type]] = {
    "metrics": {"step": int},
    "eval": {"step": int, "when": str, "eval": str},
    "samples": {"step": int, "when": str, "kind": str},
    "warnings": {"step": int, "text": str},
    "benchmarks": {"step": int, "task": str, "metric": str, "count": int},
}
PLAIN_EVERY_SECONDS, CHANGE_SECONDS = 10.0, 2.0
PACE_STEPS = 20
SHOWN = ("loss", "reward", "reward_accuracy")


class MetricsLog:
    """Writes the JSON-lines files of a stage's folder.

    Lines that belong together are one write, so a kill truncates at most the last one, which is dropped when the file
    is opened again. Every line has a checksum in a file beside it (`lm/json_lines.py`). Only process 0 writes.
    """

    def __init__(self, folder: Path, listener: Callable[[str, dict[str, Any]], None] = lambda kind, line: None) -> None:
        """`listener` is called with (kind, line) when a line has been written."""
        self.folder = Path(folder)
        self.listener = listener
        self.active = _first_process()
        self._files: dict[str, JsonLines] = {}

    def metrics(self, line: dict[str, Any]) -> None:
        """Write a line of training metrics, {"step": …, "time": …, "loss": …, …}."""
        self._write("metrics", [line])

    def evaluation(self, line: dict[str, Any]) -> None:
        """Write an eval result, {"step": …, "when": …, "eval": NAME, …}."""
        self._write("eval", [line])

    def sample(self, line: dict[str, Any]) -> None:
        """Write one sample."""
        self.samples([line])

    def warning(self, line: dict[str, Any]) -> None:
        """Write a warning about the stage, {"step": …, "kind": …, "text": …}."""
        self._write("warnings", [line])

    def samples(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write samples, {"kind": …, "step": …, "when": …, …} each, in one write: a kill leaves all of them or none."""
        self._write("samples", lines)

    def rewind(self, step: int, again: Callable[[str, dict[str, Any]], bool] = lambda kind, line: False) -> None:
        """Remove the lines of later steps when a stage resumes at `step`. Call it before the first line is written.

        Args:
            again: whether a line, given as (kind, line), of an earlier step is removed too, since it will be written again.

        Raises:
            UserError: a file is damaged.
        """
        if not self.active:
            return
        self.close()
        for kind in KINDS:
            file = self._path(kind)
            if file.exists() or checksums(file).exists():
                lines = read_json_lines(file, FIELDS[kind])
                kept = [raw for raw, line in lines if line["step"] <= step and not again(kind, line)]
                if len(kept) != len(lines) or not checksums(file).exists() or not _ends_whole(file):
                    rewrite_json_lines(file, kept)

    def check_steps(self, step: int) -> None:
        """Raise UserError unless metrics.jsonl has exactly one line for each step from 1 to `step`."""
        if not self.active:
            return
        file = self._path("metrics")
        found = [line["step"] for line in read_lines(file)]
        wrong = next((n for n, has in enumerate(found, start=1) if n != has), len(found) + 1)
        if found != list(range(1, step + 1)):
            raise UserError(
                f"{file} should have a line for each step from 1 to {step}, the checkpoint's step, but step {wrong} is "
                f"missing: put back a copy of the file, or remove {self.folder} to train the stage again"
            )

    def sync(self) -> None:
        """Sync all files to disk."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        for stream in self._files.values():
            stream.close()
        self._files.clear()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, kind: str) -> Path:
        return self.folder / f"{kind}.jsonl"

    def _write(self, kind: str, lines: Sequence[dict[str, Any]]) -> None:
        if not self.active or not lines:
            return
        texts = [json.dumps(json_value(line), ensure_ascii=False, allow_nan=False) for line in lines]
        try:
            if kind not in self._files:
                self._files[kind] = JsonLines(self._path(kind))
            self._files[kind].append([text.encode("utf-8", errors="replace") for text in texts])
        except OSError as error:
            raise UserError(
                f"{self._path(kind)} cannot be written: {error.strerror}; fix that and run the same command "
                "again to resume from the last checkpoint"
            ) from error
        for line in lines:
            self.listener(kind, json_value(line))


class Progress:
    """Progress of a stage: a rich progress bar on a terminal, a line that is written over in a notebook, else one every ten seconds.

    Only process 0 shows it.

    Args:
        start: the step at which the stage resumes.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label = label
        self.total = total
        self.active = _first_process()
        self._seen: deque[tuple[int, float]] = deque([(start, time.monotonic())], maxlen=PACE_STEPS + 1)
        self._first: tuple[int, float] | None = None
        self._printed = self._said = -math.inf  # times of the last plain lines: of a step, of another activity
        self._doing = ""
        self._bar: Any = None
        self._task: Any = None
        self._line = notebook_line() if self.active else None
        if self.active and self._line is None and sys.stdout.isatty():
            self._bar, self._task = _rich_bar(label, total, start)
            self._bar.start()

    def rate(self, step: int, tokens: int) -> float:
        """Tokens per second after `step` steps, with `tokens` tokens per step.

        Uses the median time of the latest steps, so that evaluations, saves and compilation do not count.
        """
        self._tick(step)
        paces = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in itertools.pairwise(self._seen)]
        return tokens / max(statistics.median(paces), 1e-9) if paces else 0.0

    def seconds_left(self, step: int) -> float:
        """Estimated seconds until the last step, from the mean time per step since the first (which compiles); else nan."""
        self._tick(step)
        assert self._first is not None
        since_step, since = self._first
        return (
            (self._seen[-1][1] - since) / (step - since_step) * (self.total - step) if step > since_step else math.nan
        )

    def update(self, step: int, values: Mapping[str, float], tokens: int) -> None:
        """Show that `step` steps are done, with tokens per second and the metrics of SHOWN. The last step is always shown.

        Args:
            values: the step's metrics.
            tokens: tokens per step.
        """
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        rate, left = f"{self.rate(step, tokens):,.0f} tokens/s", f"{_duration(self.seconds_left(step))} left"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, numbers=f"{left}  {shown}  {rate}"
            )  # a narrow terminal cuts the end
            return
        text = f"{self.label}  step {step}/{self.total}  {shown}  {rate}  {left}"
        if self._line is not None:
            self._line.show(text, now=step >= self.total)
        elif self.active and (step >= self.total or time.monotonic() - self._printed >= PLAIN_EVERY_SECONDS):
            self._printed = time.monotonic()
            print(text, flush=True)

    def show_activity(self, text: str) -> None:
        """Show the activity between two steps: `compiling`, `evaluating 3/12: docs`.

        Without a terminal, a line is printed when the activity changes, at most every two seconds, else every ten.
        """
        if self._bar is not None:
            self._bar.update(self._task, numbers=text, refresh=True)
            return
        if self._line is not None:
            self._line.show(f"{self.label}  {text}")
            return
        kind, now = text.split()[0].rstrip(":"), time.monotonic()
        wait = PLAIN_EVERY_SECONDS if kind == self._doing else CHANGE_SECONDS
        if self.active and now - self._said >= wait:
            self._doing, self._said = kind, now
            print(f"{self.label}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.active:
            print(text, flush=True)

    def close(self) -> None:
        """End the progress bar; later output is plain."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tick(self, step: int) -> None:
        if step > self._seen[-1][0]:
            self._seen.append((step, time.monotonic()))
        if self._first is None:
            self._first = self._seen[-1]


def _ends_whole(file: Path) -> bool:
    """Whether the file exists and its last line is complete."""
    return file.exists() and file.read_bytes()[-1:] in (b"", b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of one of a stage's JSON-lines files; [] if there is no file. A truncated last line is dropped.

    Raises UserError with file and line number if another line is damaged.
    """
    return [line for _, line in read_json_lines(path, FIELDS.get(path.stem))]


def json_value(value: Any) -> Any:
    """Convert a value to JSON types: array scalars to numbers, arrays to lists, numbers that are not finite to None."""
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if hasattr(value, "tolist"):
        return json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _first_process() -> bool:
    import jax  # not at the top: reading the lines must not load jax

    return jax.process_index() == 0


def _rich_bar(label: str, total: int, start: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    name, count = (Column(no_wrap=True, min_width=width) for width in (min(len(label), 24), 2 * len(str(total)) + 1))
    bar = RichProgress(
        TextColumn("{task.description}", table_column=name),
        BarColumn(),
        MofNCompleteColumn(table_column=count),
        TextColumn("{task.fields[numbers]}"),
    )
    return bar, bar.add_task(label, total=total, completed=start, numbers="compiling")


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
