"""What tests of whole runs share: their curves, and a run that was killed after a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from lm.train.metrics import read_lines
from lm.train.rerun import CLOCKS


def metrics(run_dir: Path, stage: str) -> list[dict]:
    """The lines of a stage's metrics, but for the clock."""
    lines = read_lines(run_dir / "stages" / stage / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def forget_last_checkpoint(run_dir: Path, stage: str, saved: int) -> None:
    """As if the stage had been killed before it saved the last of its checkpoints, of which there are `saved`."""
    here = run_dir / "stages" / stage
    (here / "summary.json").unlink()
    checkpoints = sorted(path for path in (here / "checkpoints").iterdir() if path.is_dir())
    assert len(checkpoints) == saved
    shutil.rmtree(checkpoints[-1])
