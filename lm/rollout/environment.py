"""Environments turn a task into an episode: first messages, replies to completions, and rewards at the end.

A verifier is the one-turn case: the prompt of a row, no reply, one reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lm.data.chat import Message, prompt_messages
from lm.experiment import UserError
from lm.rollout.verifiers import find_verifier
from lm.user_functions import load_function

RewardsByName = Mapping[str, float]


class Environment(Protocol):
    """Protocol of an environment; an instance is one episode, constructed without arguments.

    `reset` must depend on the task alone, since all completions of a group answer the same messages. The class attribute
    `columns` may name the columns that every row must have.
    """

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The first messages for a row of the data; the last is from the user."""
        ...

    def step(self, completion: str) -> Sequence[Message] | None:
        """The reply to the model's turn (a user message), or None if the episode is over."""
        ...

    def reward(self) -> RewardsByName:
        """Rewards by name after the end of the episode, even if it ran out of tokens; the policy learns from their sum."""
        ...


class VerifierEnvironment:
    """Single-turn environment: the prompt of a row, and the reward of the answer by each verifier."""

    def __init__(self, verifiers: Sequence[str]):
        self.verifiers = verifiers

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The prompt of the row."""
        self.task = task
        return prompt_messages(task, "the prompt")

    def step(self, completion: str) -> Sequence[Message] | None:
        """The first answer ends the episode."""
        self.completion = completion
        return None

    def reward(self) -> RewardsByName:
        """The rewards of the verifiers by name."""
        return {name: find_verifier(name)(self.task, self.completion) for name in self.verifiers}


def find_environment(name: str, where: str) -> type[Environment]:
    """The user's environment class that FILE:CLASS names.

    Raises:
        UserError: it is missing, or not an environment; `where` is the field that names it.
    """
    found = load_function(name, where)
    missing = [method for method in ("reset", "step", "reward") if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        problem = f"has no method {missing[0]}" if missing else "is no class"
        raise UserError(f"{where} is {name!r}, which {problem}; an environment is a class with reset, step and reward")
    return found
