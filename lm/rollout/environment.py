"""Environments turn a task into an episode: first messages, replies to completions, and rewards at the end.

A verifier is the one-turn case: the prompt of a row, no reply, one reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lm.config.field import shown
from lm.data.chat import Message, prompt_messages
from lm.experiment import UserError, nearest
from lm.rollout.environments.table import ENVIRONMENTS, written
from lm.rollout.environments.tools import Tool
from lm.rollout.verifiers import find_verifier
from lm.user_functions import is_function_name, load_function

RewardsByName = Mapping[str, float]


def _all_are(kind: type) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, kind) for one in value)
    )


# Further attributes of an environment's class: whether a value is right, and what it should be.
ATTRIBUTES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (_all_are(Tool), "a tuple of Tool values"),
    "unrewarded": (_all_are(str), "a tuple of names of rewards"),
    "solution": (callable, "a function of the task that gives the model's turns"),
    "full_reward": (lambda value: isinstance(value, int | float) and math.isfinite(value), "a finite number"),
}


class Environment(Protocol):
    """Protocol of an environment; an instance is one episode, constructed without arguments.

    `reset` must depend on the task alone, since all completions of a group answer the same messages. The class may have further
    attributes: `columns`, the columns that every row must have; `tools`, the tools (`lm/rollout/environments/tools.py`) that a chat template
    tells the model of; `unrewarded`, the names of rewards that are recorded and not learned from; `solution(task)`, the turns of an episode with
    the full reward, and `full_reward` (1 if missing), both for `lm env check`.
    """

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The first messages for a row of the data; the last is from the user."""
        ...

    def step(self, completion: str) -> Sequence[Message] | None:
        """The reply to the model's turn (a user message, or messages of role tool), or None if the episode is over."""
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
    """The environment of that name, from ENVIRONMENTS or the class that FILE:CLASS names.

    Raises:
        UserError: it is missing, or not an environment; `where` is the field that names it.
    """
    if not is_function_name(name):
        return _built_in(name, where)
    found = load_function(name, where)
    missing = [method for method in ("reset", "step", "reward") if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        problem = f"has no method {missing[0]}" if missing else "is no class"
        raise UserError(f"{where} is {name!r}, which {problem}; an environment is a class with reset, step and reward")
    for attribute, (is_right, wanted) in ATTRIBUTES.items():
        if hasattr(found, attribute) and not is_right(value := getattr(found, attribute)):
            raise UserError(f"{where} is {name!r}, whose {attribute} is {shown(value)}; it should be {wanted}")
    return found


def _built_in(name: str, where: str) -> type[Environment]:
    kind, _, argument = name.partition(":")
    known = [written(*one) for one in ENVIRONMENTS.items()]
    if kind not in ENVIRONMENTS:
        raise UserError(
            f"{where} is {name!r}{nearest(name, known)}; there are {', '.join(known)}, and FILE:CLASS of your own"
        )
    found = ENVIRONMENTS[kind]
    if bool(argument) != bool(found.argument):
        raise UserError(f"{where} is {name!r}; it should be {written(kind, found)}")
    try:
        return found.load(argument)
    except UserError as error:
        raise UserError(f"{where} is {name!r}; {error}") from error
