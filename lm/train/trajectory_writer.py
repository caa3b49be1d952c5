"""Writes the trajectories that a stage samples to Parquet files (`lm/train/trajectory_files.py` reads them)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lm.data.chat import said_by
from lm.experiment import Stage, UserError
from lm.parallel.distributed import run_on_main
from lm.rollout.trajectory import AUTHORS, Rollout
from lm.stored import write_atomic
from lm.train.metrics import json_value
from lm.train.trajectory_files import FOLDER, trajectory_files

MEGABYTE = 10**6

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("author", pa.string())])
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),  # number of the prompt within the step
        ("task", pa.string()),  # the row of the data, as JSON
        ("messages", pa.list_(MESSAGE)),
        ("tokens", pa.list_(pa.int32())),
        ("authors", pa.list_(pa.int8())),
        ("logp", pa.list_(pa.float32())),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("reward", pa.float32()),
        ("advantage", pa.float32()),
        ("trained", pa.bool_()),  # whether an update used it
        ("version", pa.int32()),
        ("finish", pa.string()),
    ],
    metadata={"authors": ", ".join(f"{number} {name}" for number, name in enumerate(AUTHORS))},
)


def keep_trajectories(folder: Path, stage: Stage, step: int, rollout: Rollout) -> dict[str, str]:
    """Write the trajectories of step `step` (from 1) on process 0, and remove the oldest files beyond `trajectory_mb`.

    Returns warnings by kind: that one step needs more than the limit.

    Raises:
        UserError: the file cannot be written.
    """
    size = (run_on_main(lambda: _write(folder, stage, step, rollout)) if stage.trajectory_mb else 0) or 0
    if size <= stage.trajectory_mb * MEGABYTE:
        return {}
    return {
        "trajectories": f"the trajectories of step {step} take {size / MEGABYTE:.0f} MB, more than {stage.name}.trajectory_mb "
        f"{stage.trajectory_mb}: they are not kept"
    }


def _write(folder: Path, stage: Stage, step: int, rollout: Rollout) -> int:
    """Write the file of a step and remove the oldest files beyond the limit; returns the size of the new file in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    content = _parquet(step, rollout, stage.objective.completions_per_prompt)
    path = folder / FOLDER / f"step-{step:08}-{zlib.crc32(content):08x}.parquet"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; fix that and run the same command again to resume from the "
            "last checkpoint"
        ) from error
    left = stage.trajectory_mb * MEGABYTE
    for known in reversed(trajectory_files(folder)):
        left -= known.stat().st_size
        if left < 0:
            known.unlink()
    return len(content)


def _parquet(step: int, rollout: Rollout, group_size: int) -> bytes:
    trained = set(rollout.chosen.tolist())
    rows = [
        {
            "step": step,
            "group": number // group_size,
            "task": json.dumps(json_value(dict(one.task)), ensure_ascii=True, default=str),
            "messages": [
                {"role": turn["role"], "content": _text(said_by(turn)), "author": turn["author"]}
                for turn in one.messages
            ],
            "tokens": one.tokens,
            "authors": one.authors,
            "logp": one.logp,
            "rewards": [(_text(name), value) for name, value in one.rewards.items()],
            "reward": one.reward,
            "advantage": float(advantage),
            "trained": number in trained,
            "version": one.version,
            "finish": one.finish,
        }
        for number, (one, advantage) in enumerate(zip(rollout.trajectories, rollout.advantages, strict=True))
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _text(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
