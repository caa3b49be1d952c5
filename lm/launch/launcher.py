"""A launcher as a value: a place where experiments run, its flags, and the function that hands a job over to it.

Each place is one file of this folder with one `LAUNCHER`, and a row of lm/launch/table.py.
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
    """A flag of `lm launch` that some launchers have; the others refuse it."""

    metavar: str | None  # None: a switch
    help: str
    problem: Callable[[str], str | None] | None = None  # what is wrong with a value, as the end of a sentence
    range: Range | None = None  # of an integer
    repeated: bool = False


JOB_NAME = {"--job-name": Flag("NAME", "of the job; else the experiment's")}


@dataclass(frozen=True)
class Launch:
    """What a dry run prints, and what else happens; `go` returns an exit code."""

    text: str
    go: Callable[[], int]


@dataclass(frozen=True)
class SweepWorkers:
    """How a place runs the workers of a sweep, `lm sweep --on`.

    Args:
        flags: those of the launcher's that it reads.
        hand_over: (arguments of `lm sweep`, name of the job, words of a worker's command, folders that it writes) -> Handover.
    """

    flags: tuple[str, ...]
    hand_over: Callable[[argparse.Namespace, str, list[str], tuple[str, ...]], Handover]


@dataclass(frozen=True)
class Launcher:
    """A place where experiments run.

    Args:
        name: as of --on.
        help: lines for `lm launch --help`.
        flags: by name.
        launch: (arguments, experiment, job) -> Launch; raises UserError at what cannot work there.
        required: flags that it cannot do without.
        max_restarts: without --max-restarts.
        join_timeout: seconds, without --join-timeout; None: as of `lm run`.
        workers: None: no sweep's.
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
    """The value given for a flag."""
    return getattr(arguments, flag.removeprefix("--").replace("-", "_"))


def handing_over(handover: Handover) -> Launch:
    """The launch that gives a text to a command."""

    def go() -> int:
        hand_over(handover)
        for line in handover.next:
            print(f"lm launch: {line}")
        return 0

    return Launch(handover.text, go)
