"""Trajectories: episodes as they were sampled, read by training, evaluation, report and trajectory files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int8, Int32

from lm.types import RolloutBatch, SharedPrompt

AUTHORS = ("prompt", "model", "environment")
"""Authors of tokens, indexed by `Trajectory.authors`."""
PROMPT, MODEL, ENVIRONMENT = range(len(AUTHORS))

STOP, LENGTH, TIMEOUT, MOST_TURNS = "stop", "length", "timeout", "turns"
"""Why an episode ended: over after a complete turn; out of tokens; the environment took too long; out of turns."""


@dataclass(frozen=True)
class Trajectory:
    """One episode: tokens exactly as sampled, with author and log-probability of each, and rewards by name.

    `logp` is the sampler's log-probability at the sampling temperature, 0 for tokens that the model did not choose. `messages` are
    the same episode as text, each with its `author`. `rewards` has the rewards by name, `reward` is the training reward.
    `version` is the number of training steps of the weights that sampled it.
    """

    task: Mapping[str, Any]
    messages: tuple[Mapping[str, Any], ...]
    tokens: Int32[np.ndarray, " T"]
    authors: Int8[np.ndarray, " T"]
    logp: Float32[np.ndarray, " T"]
    finish: str
    version: int
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether the episode ended before it ran out of tokens or time."""
        return self.finish == STOP

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the model's first."""
        return int((self.authors == PROMPT).sum())

    @property
    def length(self) -> int:
        """Number of tokens that the model sampled."""
        return int((self.authors == MODEL).sum())

    @property
    def prompt(self) -> str:
        """The text of the turn that the model answered first."""
        return prompt_text(self.messages)

    @property
    def text(self) -> str:
        """Text of the model's last turn."""
        return next(turn["content"] for turn in reversed(self.messages) if turn["author"] == AUTHORS[MODEL])


@dataclass(frozen=True)
class Rollout:
    """Result of a step's sampling: the batches of its updates, and all trajectories with their advantages.

    `chosen` are the trajectories that are in the batches, in order; `rows` is the trajectory of each row of the first
    epoch's batches, None where that is `chosen`. `has_trainer_logp`: `old_logp` of the batches is already
    the trainer's, not the sampler's.
    """

    batches: Sequence[RolloutBatch]
    trajectories: list[Trajectory]
    advantages: Float[np.ndarray, " N"]
    chosen: Int[np.ndarray, " B"]
    metrics: dict[str, float]
    has_trainer_logp: bool = False
    rows: Int[np.ndarray, " B"] | None = None


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the turn that the model answers first."""
    return next(turn["content"] for turn in reversed(messages) if turn["author"] == AUTHORS[PROMPT])


def rewards_of(trajectories: Sequence[Trajectory]) -> Float32[np.ndarray, " N"]:
    """The training reward of each trajectory."""
    return np.array([one.reward for one in trajectories], np.float32)


def rescored(trajectory: Trajectory, score: float) -> Trajectory:
    """The trajectory with `score` as its training reward."""
    return replace(trajectory, rewards={**trajectory.rewards, "score": score}, reward=score)


def reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The mean of each reward by name, as metrics `reward_NAME`; 0 counts where an episode has none of that name."""
    names = dict.fromkeys(name for one in trajectories for name in one.rewards)
    return {f"reward_{name}": float(np.mean([one.rewards.get(name, 0.0) for one in trajectories])) for name in names}


def sample_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Metrics of the samples: mean length in sampled tokens and fraction of completions that ended."""
    return {
        "completion_length": float(np.mean([one.length for one in trajectories])),
        "eos_rate": float(np.mean([one.ended for one in trajectories])),
    }


def staleness_metrics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Metric `staleness`: training steps between the weights that sampled and those before step `step` (from 0), on average."""
    return {"staleness": float(np.mean([step - one.version for one in trajectories]))}


def trajectory_batch(
    trajectories: Sequence[Trajectory],
    prompt_width: int,
    width: int,
    pad_id: int,
    advantages: Float[np.ndarray, " B"] | None = None,
    group_size: int = 1,
) -> RolloutBatch:
    """A batch on the host, one row per trajectory: prompts left padded, the rest right padded, weight on sampled tokens only.

    Args:
        prompt_width: number of columns of the prompts; the tokens after them have `width` columns.
        advantages: one for each trajectory; None: 0.
        group_size: number of adjacent rows with the same prompt.
    """
    rows, columns = len(trajectories), prompt_width + width
    tokens = np.full((rows, columns), pad_id, np.int32)
    weights, logp = np.zeros((2, rows, columns), np.float32)
    real = np.zeros((rows, columns), bool)
    for row, one in enumerate(trajectories):
        start = prompt_width - one.prompt_length
        place = np.s_[row, start : start + len(one.tokens)]
        tokens[place], logp[place], real[place] = one.tokens, one.logp, True
        weights[place] = one.authors == MODEL
    given = np.zeros(rows, np.float32) if advantages is None else advantages
    return RolloutBatch(
        tokens=tokens,
        weights=weights,
        segments=real.astype(np.int32),
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        advantages=weights * given[:, None].astype(np.float32),
        old_logp=logp,
        sampler_logp=logp,
        shared=SharedPrompt(group_size, prompt_width),
    )
