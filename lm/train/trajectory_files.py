"""Trajectory files: every trajectory that a stage sampled, one Parquet file per step, in the stage's folder `trajectories`.

`step-00000012-1a2b3c4d.parquet` belongs to step 12 and has the CRC-32 1a2b3c4d, by which damage is detected. A file is a
function of the experiment and its step: a resumed run writes a lost file again with the same content. The oldest files
are removed when all together exceed `trajectory_mb`, so that the files kept do not depend on kills. Those that a finished
stage kept are counted in its summary.json: a missing one is noticed. Without its folder `trajectories` a stage has none.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lm.config.field import UserError
from lm.stored import write_atomic

FOLDER = "trajectories"
"""The folder of the files, and the field of summary.json that counts them."""


def trajectory_files(folder: Path) -> list[Path]:
    """The trajectory files in a stage's folder, ordered by step."""
    return sorted((folder / FOLDER).glob("step-*.parquet"))


def step_of(path: Path) -> int:
    """The step of a trajectory file, from its name. Raises UserError for a name that has none."""
    named = re.fullmatch(r"step-(\d{8,18})-[0-9a-f]{8}\.parquet", path.name, re.ASCII)
    if named is None:
        raise UserError(f"{path} has a name that no trajectory file has: step-00000012-1a2b3c4d.parquet; move it away")
    return int(named[1])


def write_step_file(folder: Path, step: int, content: bytes) -> Path:
    """Write the Parquet file of a step, named by the step and its CRC-32, into a folder (made if missing); returns its path.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / f"step-{step:08}-{zlib.crc32(content):08x}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_atomic(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; fix that and run the same command again to resume from the "
            "last checkpoint"
        ) from error


def rewind_trajectories(folder: Path, step: int) -> None:
    """Remove the files of later steps, which will be sampled again, and temporary files that a kill left."""
    for draft in (folder / FOLDER).glob("*.tmp"):
        draft.unlink()
    for path in trajectory_files(folder):
        if step_of(path) > step:
            path.unlink()


def count_trajectories(folder: Path) -> dict[str, int]:
    """The number of trajectory files in a stage's folder and the first and last step of them; {} if there is none."""
    steps = [step_of(path) for path in trajectory_files(folder)]
    return {"files": len(steps), "first": steps[0], "last": steps[-1]} if steps else {}


def check_counted(folder: Path, summary: Mapping[str, Any]) -> None:
    """Raise UserError if some of the trajectory files that a finished stage kept are missing."""
    then, now = summary.get(FOLDER), count_trajectories(folder)
    if then and then != now and (folder / FOLDER).exists():
        raise UserError(
            f"{folder / FOLDER} has {now.get('files', 0)} of the {then['files']} trajectory files that the stage kept, of "
            f"steps {then['first']} to {then['last']}: put back copies of the others, or remove the folder"
        )


def check_trajectories(folder: Path, summary: Mapping[str, Any]) -> None:
    """Raise UserError if a trajectory file is damaged, or is missing by the summary of a finished stage."""
    check_counted(folder, summary)
    for path in trajectory_files(folder):
        read_sealed_file(path)


def read_trajectories(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a trajectory file (SCHEMA in `trajectory_writer.py`): all columns, or these.

    Raises:
        UserError: the file is damaged, or cannot be read.
    """
    return read_columns(path, columns).to_pylist()


def read_columns(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read columns of a trajectory file, or all; one that an older lm did not write is null.

    Raises:
        UserError: the file is damaged, or cannot be read.
    """
    content = read_sealed_file(path)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            there = set(file.schema_arrow.names)
            table = file.read([name for name in columns if name in there] if columns is not None else None)
            table.validate(full=True)
        for name in [name for name in columns or () if name not in there]:
            table = table.append_column(name, pa.nulls(len(table)))
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: it is no Parquet file of trajectories ({error!s:.100}); remove the folder"
        ) from error


def read_sealed_file(path: Path, remedy: str = "put back a copy, or remove the folder") -> bytes:
    """The content of a file with its CRC-32 in its name. Raises UserError, with the remedy, if it is damaged or missing."""
    step_of(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if f"{zlib.crc32(content):08x}" != path.stem.split("-")[-1]:
        raise UserError(f"{path} is damaged, it does not match the checksum in its name: {remedy}")
    return content
