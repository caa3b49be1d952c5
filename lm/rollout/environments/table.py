"""The built-in environments by name: `NAME`, or `NAME:ARGUMENT` for those that take one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lm.rollout.environments.countdown import Countdown
from lm.rollout.environments.gym import gym_task
from lm.rollout.environments.tool_dialogue import CalculatorDialogue, python_dialogue, search_dialogue


@dataclass(frozen=True)
class BuiltIn:
    """A built-in environment: `load` gives its class for the argument, `tasks` is the source of its tasks, if it has its own.

    `argument` says what follows the colon; empty: nothing does. `{}` in `tasks` stands for the argument.
    """

    load: Callable[[str], Any]
    tasks: str = ""
    argument: str = ""


ENVIRONMENTS: dict[str, BuiltIn] = {
    "countdown": BuiltIn(lambda _: Countdown, "gen:countdown"),
    "calculator": BuiltIn(lambda _: CalculatorDialogue, "gen:products"),
    "python": BuiltIn(lambda _: python_dialogue(), "gen:products"),
    "search": BuiltIn(search_dialogue, argument="FILE"),
    "gym": BuiltIn(gym_task, "gym:{}", argument="NAME"),
}


def written(name: str, one: BuiltIn) -> str:
    """How an environment is named in a field: `search:FILE`."""
    return f"{name}:{one.argument}" if one.argument else name
