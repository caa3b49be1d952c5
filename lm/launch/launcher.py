"""The `Launcher` value: a place where experiments run (cluster, TPU VMs, this machine), its flags, and its launch function.

Each place is a file in this folder that defines `LAUNCHER`, and a row of lm/launch/table.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lm.config.field import Range
from lm.experiment import Experiment
from lm.launch.job import Handover, Job, hand_over
from lm.launch.values import LARGEST

COUNT = Range(least=1, most=LARGEST)


@dataclass(frozen=True)
class Flag:
    """A flag of `lm launch` that only some launchers have; the others refuse it."""

    metavar: str | None  # None: a switch without a value
    help: str
    problem: Callable[[str], str | None] | None = None  # value -> error text such as "should be …", or None if valid
    range: Range | None = None  # range of an integer flag
    repeated: bool = False  # whether the flag may be given several times


JOB_NAME = {"--job-name": Flag("NAME", "name of the job (default: from the experiment's name)")}


@dataclass(frozen=True)
class Launch:
    """A prepared launch: the text that a dry run prints, and the function that launches and returns an exit code."""

    text: str
    go: Callable[[], int]


@dataclass(frozen=True)
class SweepWorkers:
    """How a launcher runs the workers of a sweep (`lm sweep --on`).

    Args:
        flags: names of the launcher's flags that apply to workers.
        hand_over: (arguments of `lm sweep`, job name, words of a worker's command, flag -> folder it writes) -> Handover.
    """

    flags: tuple[str, ...]
    hand_over: Callable[[argparse.Namespace, str, list[str], Mapping[str, str]], Handover]


@dataclass(frozen=True)
class Launcher:
    """A place where experiments run.

    Args:
        name: value of --on.
        help: lines for `lm launch --help`.
        flags: the launcher's flags by name.
        launch: (arguments, experiment, job) -> Launch; raises UserError for values that cannot work there.
        required: names of flags that must be given.
        max_restarts: default of --max-restarts.
        join_timeout: default of --join-timeout in seconds; None: the default of `lm run`.
        workers: how workers of a sweep are launched; None: not supported.
    """

    name: str
    help: str
    flags: Mapping[str, Flag]
    launch: Callable[[argparse.Namespace, Experiment, Job], Launch]
    required: tuple[str, ...] = ()
    max_restarts: int = 3
    join_timeout: int | None = None
    workers: SweepWorkers | None = None


def value_of(arguments: argparse.Namespace, flag: str) -> Any:
    """The parsed value of a flag."""
    return getattr(arguments, flag.removeprefix("--").replace("-", "_"))


def handover_launch(handover: Handover) -> Launch:
    """A launch that carries out a handover and prints how to watch and stop the job."""

    def go() -> int:
        hand_over(handover)
        for line in handover.next:
            print(f"lm launch: {line}")
        return 0

    return Launch(handover.text, go)
