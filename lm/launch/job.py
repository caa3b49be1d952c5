"""The `Job` value (an `lm run` to launch), checks that all launchers share, and the handover of its text to a tool."""

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
MOST_CHARACTERS = 39  # of the 63 of a DNS name, since JobSet appends to it; also the limit of xpk
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
SWEEP_GRACE = 300  # seconds that a sweep worker has to save after SIGTERM
COORDINATOR_PORT = 8482  # jax's default on TPUs


@dataclass(frozen=True)
class Job:
    """One run to launch, independent of the place."""

    name: str  # the job's name (not the run's)
    experiment: str  # name or path, as for `lm run`
    overrides: tuple[str, ...]  # --a.b.c VALUE …
    run_dir: str
    until: str | None
    max_restarts: int
    grace: int  # seconds between SIGTERM and SIGKILL, enough for a step and a save
    join_timeout: int | None = None  # seconds that processes wait for each other at the start; None: `lm run`'s default

    def command(self, *program: str) -> tuple[str, ...]:
        """The words of the `lm run` command that every host starts; `program` is how `lm` is called there."""
        return (*program, "run", self.experiment, *self._rest())

    def supervised(self, *program: str) -> tuple[str, ...]:
        """The words of a command that supervises that `lm run`, for hosts without anything else that restarts it."""
        limits = ("--max-restarts", str(self.max_restarts), "--grace", str(self.grace))
        return (*program, "launch", self.experiment, "--on", "local", *limits, *self._rest())

    def _rest(self) -> tuple[str, ...]:
        until = () if self.until is None else ("--until", self.until)
        patience = () if self.join_timeout is None else ("--join-timeout", str(self.join_timeout))
        return ("--run-dir", self.run_dir, *until, *patience, *self.overrides)


@dataclass(frozen=True)
class Handover:
    """What a launcher hands over: `text`, given to `command` on its standard input."""

    text: str  # a manifest or a script, which a dry run prints
    command: tuple[str, ...]
    tools: tuple[str, ...]  # programs that must be installed
    next: tuple[str, ...]  # lines to print: how to watch and stop the job


def hand_over(handover: Handover) -> None:
    """Run a handover's command with its text as input.

    Raises:
        UserError: a tool is missing, or the command failed.
    """
    for tool in handover.tools:
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on PATH; --dry-run prints its input, for use on a machine that has it")
    code = subprocess.run(handover.command, input=handover.text, text=True).returncode
    if code:
        raise UserError(f"{' '.join(handover.command)} failed with exit code {code}; its output is above")


def job_name(experiment: Experiment, given: str | None) -> str:
    """The given job name, else the experiment's name with hyphens for characters that DNS names cannot have.

    Raises:
        UserError: it is not a valid DNS name, or longer than MOST_CHARACTERS.
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
    """Check that the experiment's mesh uses all requested devices, so that none is idle.

    Args:
        devices: number of devices in all slices together.
        slices: number of slices.
        asked: the flags that request them, for error messages.
        platform: platform of the devices: tpu, gpu or cpu.

    Raises:
        UserError: the mesh uses another number of devices or slices, or does not divide the shapes of the experiment.
    """
    from lm.parallel.mesh import axis_sizes, check_fits, check_split  # jax: only where there is something to launch

    trains = devices - experiment.rollout_mesh.devices
    try:
        check_split(experiment, devices, platform)
        sizes = axis_sizes(experiment.mesh, trains)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error
    used = math.prod(sizes.values())
    if used != trains:
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "of one device"
        raise UserError(
            f"{asked} has {trains} devices; the mesh ({shown}) uses {used}: "
            "set one axis to -1, which takes all remaining devices (--mesh.data -1)"
        )
    if sizes["slices"] != slices:
        raise UserError(f"{asked}: mesh.slices is {sizes['slices']}; it should be {slices} (--mesh.slices {slices})")
    try:
        check_fits(experiment, sizes, platform)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error


def check_experiment_path(experiment: str, how: str) -> None:
    """Check that the experiment is a name or a file below this folder, so that other machines find it by the same path.

    Args:
        how: the files that the machines have, for the error message.

    Raises:
        UserError: it is a path outside this folder.
    """
    path = Path(experiment)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{experiment}: the job's machines have {how}, so name a file below this folder")


def check_command_words(words: Iterable[str]) -> None:
    """Raise UserError for a word that cannot be part of a command, however it is quoted."""
    for word in words:
        wrong = word_problem(word)
        if wrong:
            raise UserError(f"{word!r} {wrong}")


def local_folder_warning(folder: str, flag: str = "--run-dir") -> str | None:
    """A warning if the folder that a flag names is in a place that is local to each machine, such as /tmp; else None."""
    path = Path(folder).absolute()
    if not any(path.is_relative_to(local) for local in LOCAL_FOLDERS):
        return None
    return f"{folder} looks like a folder local to each machine; all hosts must see the same {flag}"
