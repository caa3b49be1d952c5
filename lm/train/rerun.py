"""Comparison of a run with a repetition of it: differences in the environment, and the first number that differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.experiment import UserError, diff
from lm.train.metrics import read_lines
from lm.train.provenance import environment, last_session

CLOCKS = ("time", "tokens_per_second", "mfu")  # fields that depend on the clock and are not compared
NUMBERS = ("metrics.jsonl", "eval.jsonl")


def changed_conditions(run_dir: Path, data: Mapping[str, str]) -> list[tuple[str, Any, Any]]:
    """Differences, as (field, then, now), that could change results: versions, code, devices, data.

    Args:
        data: fingerprints of all that the run reads, by name; one that an older lm did not record is no difference.

    Raises:
        UserError: the run never began.
    """
    then = last_session(run_dir)
    if not then:
        raise UserError(f"{run_dir} has no environment.json: the run never began, so there is nothing to repeat")
    now = environment({name: found for name, found in data.items() if name in then["data_fingerprint"]})
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
    """Description of the first number that differs between two runs; "" if all are bitwise equal."""
    for stage in stages:
        for file in NUMBERS:
            before, after = (_lines(folder / "stages" / stage / file) for folder in (old, new))
            for one, two in zip(before, after, strict=False):
                for name in one:
                    if one[name] != two.get(name):
                        return f"{stage}, {file}, step {one['step']}: {name} was {one[name]} and is now {two.get(name)}"
            if len(before) != len(after):
                return f"{stage}, {file}: had {len(before)} lines and has now {len(after)}"
    return ""


def _lines(file: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in read_lines(file)]
