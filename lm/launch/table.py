"""Table of the launchers; a new one is a file with its `LAUNCHER` and an entry here."""

from __future__ import annotations

from lm.launch import gke, local, slurm, tpu_vm
from lm.launch.launcher import Flag

LAUNCHERS = {launcher.name: launcher for launcher in (gke.LAUNCHER, tpu_vm.LAUNCHER, slurm.LAUNCHER, local.LAUNCHER)}
FLAGS: dict[str, Flag] = {name: flag for launcher in LAUNCHERS.values() for name, flag in launcher.flags.items()}


def launchers_with(flag: str) -> list[str]:
    """Names of the launchers that have a flag."""
    return [name for name, launcher in LAUNCHERS.items() if flag in launcher.flags]
