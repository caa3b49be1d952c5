"""The folder of a sweep: its layout, the sweep that it belongs to, and its locks, which end with their process.

sweeps/NAME/  sweep.json  journal.log  lock  compare.html
              trials/KEY/         the folder of a run, with trial.json, claim and log.txt
sweeps/shared/KEY/  a stage that several runs share, of this sweep or of others; their stage folders are links to it
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.changes import normalised, read_experiment
from lm.experiment import UserError, diff, from_dict, to_dict
from lm.stored import make_folder, read_json, take_lock, write_json_atomic, write_sealed
from lm.sweep.results import DESCRIPTION, read_description, read_trial
from lm.sweep.sweep import Range, Suggested, Sweep
from lm.sweep.trials import Trial, key_of, label_on

MOST_DIFFERENCES = 5


@dataclass(frozen=True)
class SweepFolder:
    """Paths of one sweep. Nothing is created on disk before `claim`.

    Args:
        store: folder of the shared stages, which several sweeps may use.
    """

    path: Path
    store: Path

    @property
    def description(self) -> Path:
        return self.path / DESCRIPTION

    @property
    def journal(self) -> Path:
        return self.path / "journal.log"

    def trial(self, key: str) -> Path:
        return self.path / "trials" / key

    @functools.cached_property
    def _renamed_folders(self) -> dict[str, str]:
        """Current key -> folder name of trials that an lm version with other fields created."""
        found = {}
        for path in (self.path / "trials").glob("*/experiment.json"):
            try:
                key = key_of(from_dict(read_json(path)))
            except UserError:  # a trial that cannot run, or of a version with fields that this one lacks
                continue
            if key != path.parent.name:
                found[key] = path.parent.name
        return found

    def with_existing_key(self, trial: Trial) -> Trial:
        """The trial with the key of its existing folder, if an older version created one."""
        return dataclasses.replace(trial, key=self._renamed_folders.get(trial.key, trial.key))

    def record(self, key: str) -> Path:
        """Path of a trial's record, trial.json: {"settings", "seed", "wanted", "failed", "pruned", "impossible"}."""
        return self.trial(key) / "trial.json"

    def read_record(self, key: str) -> dict[str, Any] | None:
        """Read a trial's record; None if it does not exist. Raises UserError if it is damaged."""
        return read_trial(self.record(key)) if self.record(key).exists() else None

    def shared(self, stage_key: str) -> Path:
        return self.store / stage_key

    def claim(self, sweep: Sweep) -> None:
        """Claim the folder for a sweep. The same sweep may come with other axes, values or seeds and keeps its results.

        Raises:
            UserError: the folder belongs to a sweep with another base or search (shows the differences), or to no sweep.
        """
        wanted = json.loads(json.dumps(describe(sweep)))
        if not self.description.exists():
            if self.path.exists() and any(path.name != "lock" for path in self.path.iterdir()):
                raise UserError(f"{self.path} has files but no sweep.json: name another folder (--folder DIR)")
            make_folder(self.path, "--folder DIR")
        else:
            self._refuse_another(read_description(self.path), wanted)
        write_sealed(self.description, wanted)

    def _refuse_another(self, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        different = [f"{name}: {old!r} → {new!r}" for name, old, new in _differences(there["base"], wanted["base"])]
        if there["search"].get("kind") != wanted["search"]["kind"]:
            different.insert(0, f"search: {there['search'].get('kind')} → {wanted['search']['kind']}")
        if wanted["search"]["kind"] in [kind.__name__ for kind in typing.get_args(Suggested)]:
            for name, axis in wanted["axes"].items():
                old = there["axes"].get(name, axis)
                if isinstance(axis, list) and axis != old:
                    different.append(f"axis {name}: {old} → {axis} (the choices of a search cannot change)")
        if different:
            more = len(different) - MOST_DIFFERENCES
            raise UserError(
                f"{self.path} belongs to another sweep; what differs (there → now):",
                *(f"  {line}" for line in different[:MOST_DIFFERENCES]),
                *([f"  … and {more} more"] if more > 0 else []),
                "Give this one its own folder: --folder DIR, or another name.",
            )

    def write_trial(self, trial: Trial, stage_keys: list[str]) -> None:
        """Create the folder of a trial's run, with links to shared stages, or update its record.

        For a trial that cannot run, the folder has its experiment and the reason only.
        """
        path = self.trial(trial.key)
        record = {"settings": trial.settings, "seed": trial.experiment.seed, "wanted": True}
        record["impossible"] = bool(trial.impossible)
        if trial.impossible:
            path.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path / "experiment.json", _finite(to_dict(trial.experiment)))
            return self.update(trial.key, **record, failed=trial.impossible)
        (path / "stages").mkdir(parents=True, exist_ok=True)
        for stage, key in zip(trial.experiment.stages[:-1], stage_keys, strict=False):
            self.shared(key).mkdir(parents=True, exist_ok=True)
            link = path / "stages" / stage.name
            if not os.path.lexists(link):  # a copy of the folder may have a copy of the stage
                target = os.path.relpath(self.shared(key).resolve(), link.parent.resolve())
                link.symlink_to(target, target_is_directory=True)
        if not (path / "experiment.json").exists():
            write_json_atomic(path / "experiment.json", to_dict(trial.experiment))
        elif different := _differences(read_experiment(path), to_dict(trial.experiment)):
            name, old, new = different[0]
            raise UserError(
                f"{path} holds a run with {name} {old!r}, but this trial has {new!r}, the default of this version of lm: name "
                "another folder (--folder DIR)"
            )
        self.update(trial.key, **record)

    def update(self, key: str, **changes: Any) -> None:
        """Update fields of a trial's record."""
        known = self.read_record(key) or {}
        if known | changes != known:
            write_sealed(self.record(key), known | changes)

    def failed(self, key: str) -> str:
        """The reason why a trial failed; "" if it did not fail or has not ended."""
        return (self.read_record(key) or {}).get("failed", "")

    def want_only(self, keys: set[str]) -> None:
        """Mark all trials but these as no longer wanted by the sweep; their runs are kept."""
        for file in (self.path / "trials").glob("*/trial.json"):
            if file.parent.name not in keys:
                self.update(file.parent.name, wanted=False)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which this process holds the sweep's lock, so that no other worker takes a trial."""
        make_folder(self.path, "--folder DIR")
        handle = take_lock(self.path / "lock", "--folder DIR", wait=True)
        assert handle is not None
        try:
            yield
        finally:
            os.close(handle)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Differences (field, old, new) of two plain experiments, except in their names."""
    return [one for one in diff(normalised(old), normalised(new)) if one[0] != "name"]


def try_lock(file: Path) -> int | None:
    """Take a lock; returns its file descriptor, or None if it is held. A child that inherits the descriptor holds it too."""
    make_folder(file.parent, "--folder DIR")
    return take_lock(file, "--folder DIR")


def describe(sweep: Sweep) -> dict[str, Any]:
    """A sweep as a plain value for sweep.json; functions are replaced by labels."""
    search = {"kind": type(sweep.search).__name__} | vars(sweep.search)
    return {
        "name": sweep.name,
        "search": search,
        "seeds": list(sweep.seeds),
        "metric": sweep.metric,
        "axes": {name: _describe_axis(sweep, name) for name in sweep.axes},
        "baseline": dict(sweep.baseline),
        "base": to_dict(sweep.base),
    }


def _finite(value: Any) -> Any:
    """Replace nan and infinities in a plain value by text, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _describe_axis(sweep: Sweep, name: str) -> Any:
    values = sweep.axes[name]
    if isinstance(values, Range):
        return {"kind": type(values).__name__} | vars(values)
    if isinstance(values, Mapping):
        return list(values)
    return [label_on(sweep.base, name, values, place) for place in range(len(values))]
