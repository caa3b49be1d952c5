"""What a stage that resumes removes, because it will write it again."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lm.experiment import Stage
from lm.train.metrics import MetricsLog, read_lines
from lm.train.trajectory_files import rewind_trajectories


def rewind(log: MetricsLog, stage: Stage, folder: Path, start: int) -> None:
    """Drop the lines and trajectories that the stage wrote after step `start`. Raises UserError if earlier ones are missing."""
    log.rewind(start, functools.partial(_is_repeated, stage, start, _done_before(folder)))
    log.check_steps(start)
    rewind_trajectories(folder, start)


def _done_before(folder: Path) -> set[str]:
    """Names of the evals whose "before" measurement is complete: a line in eval.jsonl follows its samples."""
    return {line["eval"] for line in read_lines(folder / "eval.jsonl") if line["when"] == "before"}


def _is_repeated(stage: Stage, start: int, before: set[str], kind: str, line: dict[str, Any]) -> bool:
    """Whether a logged line belongs to an evaluation that a stage resumed at step `start` runs again.

    Args:
        before: names of the evals whose "before" measurement is complete.
    """
    if kind not in ("eval", "samples") or line.get("kind") == "rollout":
        return False
    if line["when"] == "before":
        return kind == "samples" and line["kind"] != "prompt" and line.get("eval") not in before
    return line["when"] == "after" or (line["when"] == "during" and line["step"] == start and evals_due(stage, start))


def evals_due(stage: Stage, step: int) -> bool:
    """Whether evals run between steps `step` and `step` + 1."""
    return bool(stage.eval_every) and step % stage.eval_every == 0 and 0 < step < stage.steps
