"""Log of rollouts that were sampled ahead: one Parquet file per step, in the stage's folder `ahead`, until no checkpoint needs it.

`step-00000012-1a2b3c4d.parquet` has the completions of step 12, with their rewards, and the CRC-32 1a2b3c4d. It is on the disk before
the step uses it. A checkpoint names the files that a resumed run needs, since the weights that sampled them are gone by then.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lm.config.field import UserError
from lm.parallel.distributed import is_main_process, raise_on_all, run_on_main
from lm.rollout.episodes import Sampled
from lm.rollout.trajectory import AUTHORS, Trajectory
from lm.shapes import Shape, is_number, is_text, misfit, one_of
from lm.train.metrics import json_value
from lm.train.trajectory_files import read_sealed_file, read_table, step_of, write_step_file
from lm.train.trajectory_writer import sampled_columns

AHEAD = "ahead"
"""The folder of the files, and the field of a checkpoint's meta that names them."""
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("messages", pa.string()),  # as JSON, whole
        ("tokens", pa.list_(pa.int32())),
        ("authors", pa.list_(pa.int8())),
        ("logp", pa.list_(pa.float32())),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("reward", pa.float64()),
        ("version", pa.int32()),
        ("finish", pa.string()),
    ]
)
MESSAGE = {"role": is_text, "author": one_of(*AUTHORS)}
TIMEOUTS, METRICS = b"timeouts", b"metrics"


def encode(sampled: Sampled, metrics: Mapping[str, float]) -> bytes:
    """A rollout and its metrics as the content of a file."""
    rows = [
        sampled_columns(one)
        | {"messages": json.dumps(json_value(list(map(dict, one.messages))), default=str), "reward": one.reward}
        for one in sampled.trajectories
    ]
    said = {TIMEOUTS: str(sampled.timeouts), METRICS: json.dumps(metrics)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata(said)), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def decode(content: bytes) -> tuple[Sampled, dict[str, float]]:
    """The inverse of `encode`: every number and token is the same, a task is what its JSON says."""
    said = pq.read_schema(pa.BufferReader(content)).metadata
    found = [
        Trajectory(
            task=_json(row["task"], {}),
            messages=tuple(_json(row["messages"], [MESSAGE])),
            tokens=np.array(row["tokens"], np.int32),
            authors=np.array(row["authors"], np.int8),
            logp=np.array(row["logp"], np.float32),
            finish=row["finish"],
            version=row["version"],
            rewards=dict(row["rewards"]),
            reward=row["reward"],
        )
        for row in read_table(content, SCHEMA).to_pylist()
    ]
    return Sampled(found, int(said[TIMEOUTS])), _json(said[METRICS], {"*": is_number})


def _json(text: str, shape: Shape) -> Any:
    value = json.loads(text)
    if fault := misfit(value, shape):
        raise ValueError(f"{fault:.80} cannot be read")
    return value


def write(folder: Path, step: int, content: bytes) -> str:
    """Write the file of step `step` (from 1) on process 0; returns its name. Raises UserError if it cannot be written."""

    run_on_main(lambda: write_step_file(folder / AHEAD, step, content))
    return f"step-{step:08}-{zlib.crc32(content):08x}.parquet"


def read(folder: Path, names: Iterable[str]) -> dict[int, tuple[Sampled, dict[str, float]]]:
    """The rollouts in the files that a checkpoint names, by step (from 1).

    Raises:
        UserError: one is missing or damaged.
    """
    remedy = (
        f"the checkpoint cannot be resumed without it: put back a copy, or remove the newest folder in "
        f"{folder / 'checkpoints'} to resume from the one before it"
    )

    def found(path: Path) -> tuple[Sampled, dict[str, float]]:
        content = read_sealed_file(path, remedy)
        try:
            return decode(content)
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: it holds no rollout ({error!s:.100}): {remedy}") from error

    paths = [folder / AHEAD / name for name in names]
    return raise_on_all(lambda: {step_of(path): found(path) for path in paths})


def forget(folder: Path) -> None:
    """Remove the log of a finished stage."""
    shutil.rmtree(folder / AHEAD, ignore_errors=True)


def prune(folder: Path, names: Collection[str], steps: Collection[int] = ()) -> None:
    """Remove files and temporary ones, but for those with these names and those of these steps (from 1), on process 0."""
    if is_main_process():
        for path in (folder / AHEAD).glob("step-*"):
            if path.suffix == ".tmp" or (path.name not in names and step_of(path) not in steps):
                path.unlink()
