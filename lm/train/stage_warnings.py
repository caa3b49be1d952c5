"""What a stage warns of, once: signs in its metrics that it learns nothing, and what its batches note."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.experiment import GRPO, PPO, Experiment, Sampled, Stage
from lm.train.metrics import MetricsLog, read_lines

Line = dict[str, Any]

STEPS = 5  # so many steps in a row, or all of a shorter stage, before a stage is said to learn nothing


@dataclass(frozen=True)
class StageSign:
    """Something that the metrics of `steps` steps in a row may show; `text` is filled from the last of them and the objective."""

    shows: Callable[[Line], bool]
    text: str
    steps: int = STEPS


SIGNS: dict[type, dict[str, StageSign]] = {
    GRPO: {
        "equal_rewards": StageSign(
            lambda line: line.get("frac_zero_std") == 1,
            "for {steps} steps up to step {step} the answers to each prompt had the same reward (mean {reward:.3g}): advantages "
            "are 0 and the policy does not change; prompts that the model gets right now and then, a reward with more levels, a higher "
            "temperature or a larger group_size help",
        ),
    },
    PPO: {
        "equal_rewards": StageSign(
            lambda line: line.get("score_range") == 0,
            "for {steps} steps up to step {step} all answers had the same reward ({score:.3g}): nothing tells better answers from "
            "worse; prompts that the model gets right now and then, a reward with more levels or a higher temperature help",
        ),
    },
}
OF_ALL = {
    "truncated": StageSign(
        lambda line: line.get("eos_rate") == 0,
        "none of the answers of step {step} ended by itself: the policy gets no signal to end its answers; a longer max_new_tokens, or "
        "more instruction tuning before, helps (eos_rate in the metrics tells when it passes)",
        steps=1,
    ),
    "reward_timeouts": StageSign(
        lambda line: line.get("reward_timeouts", 0) > 0,
        "{reward_timeouts:.0f} rewards of step {step} took longer than {reward_seconds:g} s (objective.reward_seconds) and count "
        "as 0; the metric reward_timeouts counts them",
        steps=1,
    ),
}
"""By objective, and of every one that samples: kind -> sign."""


class Warnings:
    """Warnings of a stage: shown, and written to its `warnings.jsonl` ({"step", "kind", "text"}), each kind once.

    Make it when the log has been rewound: what was written before, in an earlier session too, is not said again.
    """

    def __init__(
        self, experiment: Experiment, stage: Stage, folder: Path, log: MetricsLog, show: Callable[[str], None]
    ) -> None:
        self.stage, self.log, self.show = stage, log, show
        signs = SIGNS.get(type(stage.objective), {}) | OF_ALL if isinstance(stage.objective, Sampled) else {}
        self.signs = {kind: (sign, min(sign.steps, stage.steps)) for kind, sign in signs.items()}
        lines = read_lines(folder / "metrics.jsonl") if self.signs and log.active else []
        self.recent: deque[Line] = deque(lines[-STEPS:], maxlen=STEPS)
        self.told = {line.get("kind") for line in read_lines(folder / "warnings.jsonl")} if log.active else set()
        if experiment.model.param_dtype != "float32" and not stage.optimizer.master_weights:
            self.add(
                "master_weights",
                f"{stage.name}.optimizer.master_weights is false: most updates are smaller than {experiment.model.param_dtype} "
                "parameters can hold, and are lost",
            )

    def see(self, line: Line) -> None:
        """Look at the metrics of the next step."""
        self.recent.append(line)
        for kind, text in found(self.signs, list(self.recent), vars(self.stage.objective)):
            self.add(kind, text, line["step"])

    def add(self, kind: str, text: str, step: int = 0) -> None:
        """Show and keep a warning, unless one of its kind was."""
        if kind in self.told:
            return
        self.told.add(kind)
        self.log.warning({"step": step, "kind": kind, "text": text})
        self.show(f"{self.stage.name}: {text}")


def found(
    signs: dict[str, tuple[StageSign, int]], lines: Sequence[Line], objective: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(kind, text) of every sign that the last lines show, as many as it takes."""
    for kind, (sign, steps) in signs.items():
        last = lines[-steps:]
        if len(last) == steps and all(map(sign.shows, last)):
            yield kind, sign.text.format(**objective | last[-1] | {"steps": steps})
