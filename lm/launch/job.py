"""A job as a value: the `lm run` that it is, what every launcher must know of it, and how its text is handed over."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lm.experiment import Experiment, UserError
from lm.launch.values import word_problem

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MOST_CHARACTERS = 39  # of 63 for a name in DNS: what JobSet appends needs the rest; and the most that xpk takes
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
SWEEP_GRACE = 300  # seconds in which a worker of a sweep saves
COORDINATOR_PORT = 8482  # the one that jax takes on TPUs


@dataclass(frozen=True)
class Job:
    """One run, wherever it is started."""

    name: str  # of the job, not of the run
    experiment: str  # as `lm run` takes it
    overrides: tuple[str, ...]  # --a.b.c VALUE …
    run_dir: str
    until: str | None
    max_restarts: int
    grace: int  # seconds between SIGTERM and SIGKILL: a step and a save have to fit
    join_timeout: int | None = None  # seconds that the processes wait for each other at a start; None: as `lm run` does

    def command(self, *program: str) -> tuple[str, ...]:
        """The words of the `lm run` that every host starts; `program` is how `lm` is called there."""
        return (*program, "run", self.experiment, *self._rest())

    def supervised(self, *program: str) -> tuple[str, ...]:
        """The words of a supervisor of that `lm run`, for hosts on which nothing else would start it again."""
        limits = ("--max-restarts", str(self.max_restarts), "--grace", str(self.grace))
        return (*program, "launch", self.experiment, "--on", "local", *limits, *self._rest())

    def _rest(self) -> tuple[str, ...]:
        until = () if self.until is None else ("--until", self.until)
        patience = () if self.join_timeout is None else ("--join-timeout", str(self.join_timeout))
        return ("--run-dir", self.run_dir, *until, *patience, *self.overrides)


@dataclass(frozen=True)
class Handover:
    """What a launcher does: gives `text` to `command` on its standard input."""

    text: str  # a manifest or a script; a dry run prints it, and nothing else
    command: tuple[str, ...]
    tools: tuple[str, ...]  # programs that must be there
    next: tuple[str, ...]  # lines: how to watch the job, how to stop it


def hand_over(handover: Handover) -> None:
    """Do it.

    Raises:
        UserError: a tool is missing, or refused.
    """
    for tool in handover.tools:
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on PATH here; --dry-run prints what to give to it on a machine that has it")
    code = subprocess.run(handover.command, input=handover.text, text=True).returncode
    if code:
        raise UserError(f"{' '.join(handover.command)} failed with code {code}; what it said is above")


def job_name(experiment: Experiment, given: str | None) -> str:
    """The name asked for, or the experiment's with hyphens for what names of machines cannot have.

    Raises:
        UserError: it is no name in DNS, or too long for what is appended to it.
    """
    name = given if given is not None else re.sub(r"[^a-z0-9]+", "-", experiment.name.lower()).strip("-")
    if not NAME.fullmatch(name) or len(name) > MOST_CHARACTERS:
        where = "--job-name" if given is not None else f"--job-name, from the experiment's name {experiment.name!r},"
        raise UserError(
            f"{where} is {name!r}; it should be lowercase letters, digits and hyphens, begin with a letter, end with a "
            f"letter or digit, and have at most {MOST_CHARACTERS} characters"
        )
    return name


def check_mesh(experiment: Experiment, devices: int, slices: int, asked: str, platform: str) -> None:
    """The mesh of the experiment takes every device that is asked for, so that none is paid for and idle.

    Args:
        devices: in all slices together.
        asked: what was asked for, in words.
        platform: of the devices: tpu, gpu, cpu.

    Raises:
        UserError: says what the mesh wants and what there would be, or which shape the mesh does not divide.
    """
    from lm.parallel.mesh import axis_sizes, check_fits  # jax: only where there is something to launch

    try:
        sizes = axis_sizes(experiment.mesh, devices)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error
    used = math.prod(sizes.values())
    if used != devices:
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "of one device"
        raise UserError(
            f"{asked} has {devices} devices; the mesh ({shown}) uses {used}: "
            "set one axis to -1, which takes all that are left (--mesh.data -1)"
        )
    if sizes["slices"] != slices:
        raise UserError(f"{asked}: mesh.slices is {sizes['slices']}; it should be {slices} (--mesh.slices {slices})")
    # A tokenizer's file is on the machines of the job; its size is checked there. All sizes divide 0.
    vocab_size = experiment.tokenizer.vocab_size if experiment.tokenizer.path is None else 0
    try:
        check_fits(experiment, sizes, vocab_size, platform)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error


def check_travels(experiment: str, how: str) -> None:
    """The experiment is a name in experiments/ or a file below this folder: another machine finds it by the same words.

    Raises:
        UserError: it is a path that leads out of here.
    """
    path = Path(experiment)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{experiment}: the machines of the job have {how}, so name a file below this folder")


def check_words(words: Iterable[str]) -> None:
    """Raises UserError at a word that no command can be given, whatever quotes are around it."""
    for word in words:
        wrong = word_problem(word)
        if wrong:
            raise UserError(f"{word!r} {wrong}")


def warn_of_local(run_dir: str) -> str | None:
    """A line for the user where the run's folder looks like one that every machine has for itself."""
    path = Path(run_dir).absolute()
    if not any(path.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        return None
    return f"{run_dir} looks like a folder that each machine has for itself; all hosts must see the same --run-dir"
