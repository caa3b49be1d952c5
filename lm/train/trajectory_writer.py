"""Writes the trajectories that a stage samples to Parquet files (`lm/train/trajectory_files.py` reads them)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int

from lm.data.chat import said_by
from lm.experiment import Stage
from lm.parallel.distributed import run_on_main
from lm.rollout.trajectory import AUTHORS, MODEL, Rollout, Trajectory
from lm.train.metrics import json_value
from lm.train.trajectory_files import FOLDER, SCHEMA, keep_only, trajectory_files, write_step_file
from lm.types import RolloutBatch

MEGABYTE = 10**6

METADATA = {"authors": ", ".join(f"{number} {name}" for number, name in enumerate(AUTHORS))}

TokenNumbers = Mapping[int, Mapping[str, Float32[np.ndarray, " T"]]]
"""Trajectory, by its place in the rollout -> column -> a number for each of its tokens."""


def token_numbers(
    rows: Int[np.ndarray, " R"], batches: Sequence[RolloutBatch], columns: Mapping[str, Sequence[np.ndarray]]
) -> TokenNumbers:
    """Per-token arrays of batches, as numbers of each trajectory's tokens.

    Args:
        rows: the trajectory of each row of the batches, in order.
        batches: on the host.
        columns: for each column an array [B, T] of every batch.
    """
    real = np.concatenate([batch.segments > 0 for batch in batches])
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return {
        int(trajectory): {name: values[row][real[row]] for name, values in whole.items()}
        for row, trajectory in enumerate(rows)
    }


def keep_trajectories(
    folder: Path, stage: Stage, step: int, rollout: Rollout, numbers: TokenNumbers | None = None
) -> dict[str, str]:
    """Write the trajectories of step `step` (from 1) on process 0, and remove the oldest files beyond `trajectory_mb`.

    Args:
        numbers: what the trainer computed for the tokens, by column of SCHEMA.

    Returns warnings by kind: that one step needs more than the limit.

    Raises:
        UserError: the file cannot be written.
    """
    size = (run_on_main(lambda: _write(folder, stage, step, rollout, numbers or {})) if stage.trajectory_mb else 0) or 0
    if size <= stage.trajectory_mb * MEGABYTE:
        return {}
    return {
        "trajectories": f"the trajectories of step {step} take {size / MEGABYTE:.0f} MB, more than {stage.name}.trajectory_mb "
        f"{stage.trajectory_mb}: they are not kept"
    }


def _write(folder: Path, stage: Stage, step: int, rollout: Rollout, numbers: TokenNumbers) -> int:
    """Write the file of a step and remove the oldest files beyond the limit; returns the size of the new file in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    content = _parquet(step, rollout, stage.objective.completions_per_prompt, numbers)
    write_step_file(folder / FOLDER, step, content)
    newest = trajectory_files(folder)[::-1]
    sizes = itertools.accumulate(path.stat().st_size for path in newest)
    keep_only(
        folder, [path for path, size in zip(newest, sizes, strict=True) if size <= stage.trajectory_mb * MEGABYTE]
    )
    return len(content)


def _parquet(step: int, rollout: Rollout, group_size: int, numbers: TokenNumbers) -> bytes:
    trained = set(rollout.chosen.tolist())
    rows = [
        {
            "step": step,
            "group": number // group_size,
            "messages": [
                {"role": turn["role"], "content": _text(said_by(turn)), "author": turn["author"]}
                for turn in one.messages
            ],
            "reward": one.reward,
            "advantage": float(advantage),
            "trained": number in trained,
            "sampled": one.length,
            "errors": sum(bool(turn.get("error")) for turn in one.messages),
            **sampled_columns(one),
            **_token_columns(one, numbers.get(number, {})),
        }
        for number, (one, advantage) in enumerate(zip(rollout.trajectories, rollout.advantages, strict=True))
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata(METADATA)), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def sampled_columns(one: Trajectory) -> dict[str, object]:
    """Columns of a trajectory that are known when it has been sampled."""
    return {
        "task": json.dumps(json_value(dict(one.task)), ensure_ascii=True, default=str),
        "tokens": one.tokens,
        "authors": one.authors,
        "logp": one.logp,
        "rewards": [(_text(name), value) for name, value in one.rewards.items()],
        "version": one.version,
        "finish": one.finish,
    }


def _token_columns(one: Trajectory, numbers: Mapping[str, Float32[np.ndarray, " T"]]) -> Mapping[str, object]:
    """The trainer's columns of a trajectory."""
    own = one.authors == MODEL
    if "trainer_logp" not in numbers or not own.any():
        return numbers
    return {**numbers, "largest_gap": float(np.abs(one.logp - numbers["trainer_logp"])[own].max())}


def _text(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
