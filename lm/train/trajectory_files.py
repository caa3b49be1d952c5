"""Trajectory files: everything that a stage sampled, a Parquet file a step, in the folder `trajectories` of the stage.

`step-00000012-1a2b3c4d.parquet` is of step 12 and has the CRC-32 1a2b3c4d, by which a damaged file is found. A file is a
function of the experiment and its step: what a kill loses is written again with the same content. The oldest files go when
all take more bytes than the stage allows, so that what is kept does not depend on kills.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lm.config.field import UserError

FOLDER = "trajectories"


def trajectory_files(folder: Path) -> list[Path]:
    """The trajectory files of a stage's folder, in order of their steps."""
    return sorted((folder / FOLDER).glob("step-*.parquet"))


def step_of(path: Path) -> int:
    """The step that a trajectory file is of."""
    return int(path.name.split("-")[1])


def rewind_trajectories(folder: Path, step: int) -> None:
    """Remove the files of later steps, which are sampled again, and what a kill left half written."""
    for draft in (folder / FOLDER).glob("*.tmp"):
        draft.unlink()
    for path in trajectory_files(folder):
        if step_of(path) > step:
            path.unlink()


def check_trajectories(folder: Path) -> None:
    """Raises UserError where a trajectory file is not what was written."""
    for path in trajectory_files(folder):
        _read(path)


def read_trajectories(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a trajectory file, by SCHEMA; all columns, or these.

    Raises:
        UserError: the file is damaged, or cannot be read.
    """
    return pq.read_table(pa.BufferReader(_read(path)), columns=columns).to_pylist()


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if f"{zlib.crc32(content):08x}" != path.stem.split("-")[-1]:
        raise UserError(f"{path} is damaged: it does not match the checksum in its name; put back a copy, or remove it")
    return content
