"""Trajectory files of a stage that sampled nothing."""

from pathlib import Path

import numpy as np

from lm.experiment import GRPO
from lm.rollout.trajectory import Rollout, Trajectory
from lm.train.trajectory_writer import keep_trajectories
from tests.helpers import tiny_stage

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def write_trajectories(stage: Path, steps: int, text: str = "") -> None:
    """Two groups of two episodes of two turns a step, `step S, answer N` their last; `text` stands behind all."""
    for step in range(1, steps + 1):
        found = [_trajectory(f"step {step}, answer {number}", text) for number in range(4)]
        chosen = np.array([0, 1])
        keep_trajectories(stage, tiny_stage(GRPO(group_size=2)), step, Rollout([], found, np.arange(4.0), chosen, {}))


def _trajectory(last: str, text: str) -> Trajectory:
    turns = (
        ("user", f"guess {text}", "prompt"),
        ("assistant", "7", "model"),
        ("user", f"higher {text}", "environment"),
    )
    messages = (*turns, ("assistant", f"{last}{text}", "model"))
    ids = np.arange(6, dtype=np.int32)
    return Trajectory(
        {}, tuple(dict(zip(("role", "content", "author"), turn, strict=True)) for turn in messages), ids,
        np.array([0, 0, 1, 2, 1, 1], np.int8), np.zeros(6, np.float32), "length", 0, {"found": 1.0, "near": 0.5}, 1.5,
    )  # fmt: skip
