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
    """Protocol of an environment; an object is one episode, made without arguments.

    `reset` has to be a function of the task alone: the completions of a group answer the same messages. An attribute
    `columns` of the class may name the columns that every row has to have.
    """

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The first messages of a row of the data; the last is the user's."""
        ...

    def step(self, completion: str) -> Sequence[Message] | None:
        """The reply to the model's turn (a user's message), or None where the episode is over."""
        ...

    def reward(self) -> RewardsByName:
        """Rewards by name once the episode has ended, also where no tokens were left; the policy learns from their sum."""
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
        """What the verifiers give."""
        return {name: find_verifier(name)(self.task, self.completion) for name in self.verifiers}


def find_environment(name: str, where: str) -> type[Environment]:
    """The user's environment class that FILE:CLASS names.

    Raises:
        UserError: there is none, or it is no environment; `where` is the field that names it.
    """
    found = load_function(name, where)
    missing = [method for method in ("reset", "step", "reward") if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        problem = f"has no method {missing[0]}" if missing else "is no class"
        raise UserError(f"{where} is {name!r}, which {problem}; an environment is a class with reset, step and reward")
    return found
