"""Index over the trajectory files of a stage: what is listed, filtered and searched, without reading tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Num

from lm.data.split import split_key
from lm.experiment import UserError
from lm.train.trajectory_files import read_columns, trajectory_files

NUMBERS = ("step", "group", "reward", "advantage", "trained", "version", "largest_gap", "sampled", "errors")
COLUMNS = [*NUMBERS, "finish", "rewards", "task"]
Column = Num[np.ndarray, " N"]


@dataclass(frozen=True)
class FilePart:
    """The index of one file: arrays with an entry for each trajectory."""

    columns: Mapping[str, Column]
    rewards: Mapping[str, Column]


@dataclass(frozen=True, eq=False)
class RolloutIndex:
    """The index of a stage: arrays with an entry for each trajectory, ordered by step and group.

    Args:
        files: the files in order of steps; `file` and `row` say where a trajectory is.
        columns: numbers by name, nan where a file has none; `finish` is a text, `task` a hash of the prompt's key.
        rewards: by name; nan where a trajectory has none of the name.
        starts: the first trajectory of each group, and the number of all at the end.
        damaged: what is wrong with each file that cannot be read.
    """

    files: tuple[Path, ...]
    columns: Mapping[str, Column]
    rewards: Mapping[str, Column]
    starts: Int[np.ndarray, " G+1"]
    damaged: tuple[str, ...]

    @functools.cached_property
    def flags(self) -> dict[str, Bool[np.ndarray, " N"]]:
        """For each of FILTERS the trajectories that it keeps."""
        return {name: keeps(self) for name, keeps in FILTERS.items()}

    def per_group(self, reduce: np.ufunc, values: Column) -> Column:
        """Reduce the trajectories of each group, [N] -> [G]."""
        return reduce.reduceat(values, self.starts[:-1]) if len(values) else values

    def spread(self, values: Column) -> Column:
        """An entry of a group for each of its trajectories, [G] -> [N]."""
        return np.repeat(values, np.diff(self.starts))


@dataclass
class StageRollouts:
    """The trajectory files of a stage and their index, which follows the files that a running stage adds and removes."""

    folder: Path
    _parts: dict[Path, FilePart | str] = field(default_factory=dict)
    _index: RolloutIndex | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def index(self) -> RolloutIndex:
        """The index of the files that are there now; files that cannot be read are named in it."""
        with self._lock:
            files = trajectory_files(self.folder)
            if self._index is None or list(self._parts) != files:
                self._parts = {path: self._parts.get(path) or read_part(path) for path in files}
                self._index = join_parts(self._parts)
            return self._index


def read_part(path: Path) -> FilePart | str:
    """The index of a file, or why it cannot be read."""
    try:
        table = read_columns(path, COLUMNS)
        # The limit on the size removes files while a stage runs, and bytes of a damaged one may be of the wrong type.
        columns = {name: _numbers(table, name) for name in NUMBERS}
        finish = table["finish"].to_numpy(zero_copy_only=False).astype(str)
        task = np.array([task_hash(text or "") for text in table["task"].to_pylist()], np.uint64)
        return FilePart(columns | {"finish": finish, "task": task}, _rewards(table))
    except UserError as error:
        return str(error)


def _numbers(table: pa.Table, name: str) -> Column:
    return pc.cast(table[name], pa.float64()).to_numpy(zero_copy_only=False).astype(float)


@functools.lru_cache(maxsize=1 << 16)
def task_hash(task: str) -> int:
    """Hash of the key of a row (JSON), equal for the same prompt in any step."""
    try:
        key = split_key(json.loads(task))
    except (ValueError, AttributeError, RecursionError):
        key = task
    return int.from_bytes(hashlib.sha256(key.encode(errors="replace")).digest()[:8], "big")


def _rewards(table: pa.Table) -> dict[str, Column]:
    """The rewards by name, nan where a trajectory has none of the name."""
    maps = table["rewards"].combine_chunks()
    counts = pc.fill_null(pc.list_value_length(pc.cast(maps, pa.list_(maps.type.field(0).type))), 0).to_numpy()
    rows = np.repeat(np.arange(len(maps)), counts)
    names, values = (np.asarray(part.to_pylist(), dtype) for part, dtype in ((maps.keys, object), (maps.items, float)))
    found = {}
    for name in dict.fromkeys(names.tolist()):
        found[name] = np.full(len(maps), np.nan)
        found[name][rows[names == name]] = values[names == name]
    return found


def join_parts(parts: Mapping[Path, FilePart | str]) -> RolloutIndex:
    """The index of several files."""
    good = {path: part for path, part in parts.items() if isinstance(part, FilePart)}
    sizes = [len(part.columns["step"]) for part in good.values()]
    names = dict.fromkeys(name for part in good.values() for name in part.rewards)
    columns: dict[str, Any] = {
        name: np.concatenate([np.zeros(0), *(part.columns[name] for part in good.values())]) for name in NUMBERS
    }
    for name, empty in (("finish", np.zeros(0, "U1")), ("task", np.zeros(0, np.uint64))):
        columns[name] = np.concatenate([empty, *(part.columns[name] for part in good.values())])
    columns["file"] = np.repeat(np.arange(len(good)), sizes)
    columns["row"] = np.concatenate([np.zeros(0, int), *(np.arange(size) for size in sizes)])
    rewards = {
        name: np.concatenate(
            [part.rewards.get(name, np.full(size, np.nan)) for part, size in zip(good.values(), sizes, strict=True)]
        )
        for name in names
    }
    places = np.stack([columns["step"], columns["group"]])
    new = np.any(places[:, 1:] != places[:, :-1], axis=0)
    starts = np.array([0, *(np.flatnonzero(new) + 1), len(columns["step"])] if len(columns["step"]) else [0])
    damaged = tuple(part for part in parts.values() if isinstance(part, str))
    return RolloutIndex(tuple(good), columns, rewards, starts, damaged)


# ---- filters: which trajectories -----------------------------------------------------------------------------------


def no_signal(index: RolloutIndex) -> Bool[np.ndarray, " N"]:
    """Trajectories of groups of two or more that all have the same advantage."""
    advantages = index.columns["advantage"]
    equal = index.per_group(np.minimum, advantages) == index.per_group(np.maximum, advantages)
    return index.spread(equal & (np.diff(index.starts) > 1))


def disagreement(index: RolloutIndex) -> Bool[np.ndarray, " N"]:
    """Trajectories of which one reward is above its mean over the group and another one below."""
    above, below = np.zeros((2, len(index.columns["step"])), bool)
    for values in index.rewards.values():
        known = ~np.isnan(values)
        count = np.maximum(index.per_group(np.add, known.astype(float)), 1)
        mean = index.spread(index.per_group(np.add, np.where(known, values, 0.0)) / count)
        slack = 1e-9 * np.maximum(np.abs(mean), 1)
        above |= known & (values > mean + slack)
        below |= known & (values < mean - slack)
    return above & below


FILTERS: dict[str, Callable[[RolloutIndex], Bool[np.ndarray, " N"]]] = {
    "no_signal": no_signal,
    "truncated": lambda index: index.columns["finish"] == "length",
    "disagreement": disagreement,
    "tool_error": lambda index: index.columns["errors"] > 0,
    "timeout": lambda index: index.columns["finish"] == "timeout",
    "not_trained": lambda index: index.columns["trained"] == 0,
}

# ---- order of groups: a number for each group, the smallest first --------------------------------------------------


def _mean(index: RolloutIndex, name: str) -> Column:
    return index.per_group(np.add, index.columns[name]) / np.maximum(np.diff(index.starts), 1)


def _largest(index: RolloutIndex, name: str) -> Column:
    return index.per_group(np.fmax, index.columns[name])


SORTS: dict[str, Callable[[RolloutIndex], Column]] = {
    "newest": lambda index: -_largest(index, "step"),
    "oldest": lambda index: _largest(index, "step"),
    "gap": lambda index: -_largest(index, "largest_gap"),
    "reward_low": lambda index: _mean(index, "reward"),
    "reward_high": lambda index: -_mean(index, "reward"),
    "longest": lambda index: -_largest(index, "sampled"),
}


# ---- search --------------------------------------------------------------------------------------------------------


def search(index: RolloutIndex, text: str) -> Bool[np.ndarray, " N"]:
    """Trajectories with the text in one of their messages, in any case.

    Raises:
        UserError: a file has been damaged or removed since the index was made.
    """
    found = [_search_file(path, text) for path in index.files]
    return np.concatenate([np.zeros(0, bool), *found])


def _search_file(path: Path, text: str) -> Bool[np.ndarray, " N"]:
    messages = read_columns(path, ["messages"])["messages"].combine_chunks()
    rows = pc.list_parent_indices(messages).to_numpy()
    contents = pc.struct_field(pc.list_flatten(messages), "content")
    hits = pc.fill_null(pc.match_substring(contents, text, ignore_case=True), False).to_numpy(zero_copy_only=False)
    found = np.zeros(len(messages), bool)
    found[rows[hits]] = True
    return found
