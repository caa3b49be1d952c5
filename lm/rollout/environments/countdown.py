"""Countdown: an expression that gives the row's target from its numbers, each used exactly once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm.data.chat import Message, prompt_messages
from lm.rollout.answer_match import marked_answers, trimmed
from lm.rollout.environments.expression import ExpressionError, evaluate, numbers_in, parse


class Countdown:
    """Single-turn environment: 1 for a right expression, in any form that Python reads, else 0."""

    columns: ClassVar[dict[str, Any]] = {"numbers": list[int], "target": int}

    @staticmethod
    def solution(task: Mapping[str, Any]) -> Sequence[str]:
        """The solution in the row."""
        return [f"The answer is {task['answer']}."]

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The prompt of the row."""
        self.task, self.completion = task, ""
        return prompt_messages(task, "the prompt")

    def step(self, completion: str) -> None:
        """The first answer ends the episode."""
        self.completion = completion

    def reward(self) -> dict[str, float]:
        """Whether the marked answer, else the whole completion, is such an expression."""
        said = next(iter(marked_answers(self.completion)), self.completion)
        return {"solved": float(solves(trimmed(said), self.task["numbers"], self.task["target"]))}


def solves(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression has the value `target` and uses each of the numbers exactly once."""
    try:
        return evaluate(text) == target and numbers_in(parse(text)) == sorted(numbers)
    except ExpressionError:
        return False
