"""Tasks of the library reasoning-gym, scored by the library: one turn, whose marked answer (else the whole turn) is the answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm.data.chat import Message, prompt_messages
from lm.data.gym import gym_family
from lm.rollout.answer_match import marked_answers


class GymTask:
    """Base class of the environments `gym:NAME`; a subclass sets the `family`.

    Rewards: `score`, the library's. `scoring_errors`, which is no reward, records that the library raised at an answer, whose score is then 0.
    """

    columns: ClassVar[dict[str, Any]] = {"gym_index": int}
    unrewarded = ("scoring_errors",)
    family: ClassVar[str]

    @staticmethod
    def solution(task: Mapping[str, Any]) -> Sequence[str]:
        """The library's answer, marked; nothing where it knows none."""
        return [f"<answer>{task['answer']}</answer>"] if task["answer"] else []

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The question."""
        self.index, self.completion = int(task["gym_index"]), ""
        return prompt_messages(task, "the prompt")

    def step(self, completion: str) -> None:
        """The first answer ends the episode."""
        self.completion = completion

    def reward(self) -> dict[str, float]:
        """The library's score of the answer."""
        said = next(iter(marked_answers(self.completion)), self.completion).strip()
        try:
            score = float(gym_family(self.family).score_answer(said, entry(self.family, self.index)))
        except Exception:  # the library's functions raise at answers of unexpected forms
            score = math.nan
        failed = not math.isfinite(score)
        return {"score": 0.0 if failed else score, "scoring_errors": float(failed)}


@functools.lru_cache(maxsize=1024)
def entry(family: str, index: int) -> dict[str, Any]:
    """A task as the library scores it; the members of a group share it."""
    return gym_family(family)[index]


def gym_task(family: str) -> type[GymTask]:
    """The environment of a family. Raises UserError as `gym_family` does."""
    gym_family(family)
    return type("GymTask", (GymTask,), {"family": family})
