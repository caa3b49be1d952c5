"""The folder of a run: its layout, who may write in it, and which experiment it belongs to.

runs/NAME/  experiment.json  environment.json  tokenizer/  report.html  lock
            stages/STAGE/    metrics.jsonl  eval.jsonl  samples.jsonl  summary.json  time.json  checkpoints/  tensorboard/
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.experiment import UserError, diff

MOST_DIFFERENCES = 10


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is made on disk before `lock` or `claim`."""

    path: Path

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def stage_folder(self, name: str) -> Path:
        return self.path / "stages" / name

    def checkpoints(self, stage: str) -> Path:
        return self.stage_folder(stage) / "checkpoints"

    def summary(self, stage: str) -> Path:
        return self.stage_folder(stage) / "summary.json"

    def finished(self, stage: str) -> bool:
        """Whether the stage has run to its end: its summary is written last."""
        return self.summary(stage).exists()

    def read_experiment(self) -> dict[str, Any]:
        """The plain value of the experiment that the folder belongs to.

        Raises UserError if it belongs to none.
        """
        if not self.experiment.exists():
            raise UserError(f"{self.path} is not the folder of a run: it has no experiment.json")
        return read_json(self.experiment)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder alone. The lock dies with the process, however it dies.

        Raises UserError naming the process that holds it.
        """
        handle = self._take_lock()
        try:
            yield
        finally:
            os.close(handle)

    def claim(self, experiment: dict[str, Any]) -> bool:
        """Make this the folder of `experiment` (a plain value); True if it was already, and the run goes on.

        A folder in which no stage has begun is taken over: whoever mends a mistake runs the same command again.
        Raises UserError that shows what differs if the folder belongs to another experiment.
        """
        experiment = json.loads(json.dumps(experiment))
        if not self.experiment.exists():
            self._refuse_foreign_files()
            self.path.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.experiment, experiment)
            return False
        differences = diff(self.read_experiment(), experiment)
        if not differences:
            return True
        if self._begun():
            raise UserError(self._refusal(differences))
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        write_json_atomic(self.experiment, experiment)
        return False

    def set_aside(self) -> Path | None:
        """Rename the folder to NAME.1 (or the first number that is free), and lose nothing. None if there is no folder.

        Call it before `lock`. Raises UserError while another process runs in the folder, and where it holds no run.
        """
        if not self.path.exists():
            return None
        self._refuse_foreign_files()
        with self.lock():
            aside = next(p for n in itertools.count(1) if not (p := self._numbered(n)).exists())
            self.path.rename(aside)
        return aside

    def _begun(self) -> bool:
        return any(path.is_file() for path in (self.path / "stages").rglob("*"))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _take_lock(self) -> int:
        file = self.path / "lock"
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(handle)
                raise UserError(
                    f"{self.path} is in use by {holder}: wait for it, stop it, or give this run its own folder (--run-dir DIR)"
                ) from None
            if _is_open_file(handle, file):
                break
            os.close(handle)  # the folder was set aside between open and flock
        os.truncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return handle

    def _refuse_foreign_files(self) -> None:
        """A folder that has files but no experiment.json is somebody's, and not a run's."""
        if self.experiment.exists() or not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder (--run-dir DIR)")
        own = {"lock", "experiment.json.tmp"}
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in own and not p.name.startswith("."))
        if foreign:
            raise UserError(
                f"{self.path} has files ({foreign[0]}, …) but no experiment.json, so it is not a run's folder: "
                "name another one (--run-dir DIR)"
            )

    def _refusal(self, differences: list[tuple[str, Any, Any]]) -> str:
        lines = [f"  {name}: {_shown(old)} → {_shown(new)}" for name, old, new in differences[:MOST_DIFFERENCES]]
        if len(differences) > MOST_DIFFERENCES:
            lines.append(f"  … and {len(differences) - MOST_DIFFERENCES} more")
        return "\n".join(
            [
                f"{self.path} belongs to a run of another experiment; what differs (there → now):",
                *lines,
                "Two ways out: give this run its own folder (--run-dir DIR), or start it afresh "
                "(--fresh moves the old folder aside and loses nothing).",
            ]
        )


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` so that a reader, or a kill at any moment, finds the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, allow_nan=False, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError with the line where it is broken, or where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _is_open_file(handle: int, file: Path) -> bool:
    return file.exists() and os.path.samestat(os.fstat(handle), file.stat())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
