"""Run a run's value again, and see whether its curve comes out the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm.experiment import UserError, diff
from lm.train.metrics import read_lines
from lm.train.provenance import environment, last_session

CLOCKS = ("time", "tokens_per_second", "mfu")  # what no two runs have in common
NUMBERS = ("metrics.jsonl", "eval.jsonl")


def conditions(run_dir: Path, data_fingerprint: Any) -> list[tuple[str, Any, Any]]:
    """(what, then, now) of everything that differs here and could change a number: versions, code, devices, data.

    Raises:
        UserError: the run never began.
    """
    then = last_session(run_dir)
    if not then:
        raise UserError(f"{run_dir} has no environment.json: it never began, and there is nothing to run again")
    now = environment(data_fingerprint)
    return diff(_essential(then), _essential(now))


def _essential(session: dict[str, Any]) -> dict[str, Any]:
    git = session.get("git") or {}
    return {
        "versions": session["versions"],
        "python": session["python"],
        "cpu": session["cpu"],
        "cores": session["cores"],
        "devices": session["devices"],
        "commit": git.get("commit"),
        "uncommitted changes": git.get("diff") or "",
        "data": session["data_fingerprint"],
    }


def first_difference(old: Path, new: Path, stages: list[str]) -> str:
    """Where two runs part: the first number of the first line of the first stage; "" where all are the same to the bit."""
    for stage in stages:
        for file in NUMBERS:
            before, after = (_lines(folder / "stages" / stage / file) for folder in (old, new))
            for one, two in zip(before, after, strict=False):
                for name in one:
                    if one[name] != two.get(name):
                        return f"{stage}, {file}, step {one['step']}: {name} was {one[name]}, and is {two.get(name)}"
            if len(before) != len(after):
                return f"{stage}, {file}: {len(before)} lines, and now {len(after)}"
    return ""


def _lines(file: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in read_lines(file)]
