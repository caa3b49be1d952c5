"""Data set folders: finds the files of a split, in the layouts of Hugging Face's datasets library and hub repositories.

A source may be FOLDER, FOLDER/SPLIT, FOLDER/CONFIG or FOLDER/CONFIG/SPLIT. The splits are declared by `dataset_dict.json`,
`state.json` or the `configs` of the README, or follow from the file names (`data/train-00000-of-00002.parquet`).
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lm.data.readers import kind_of
from lm.experiment import UserError

TRAIN, DEFAULT = "train", "default"
KEYWORDS = {
    "train": TRAIN, "training": TRAIN, "validation": "validation", "valid": "validation", "dev": "validation",
    "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
WORD_ENDS = re.compile(r"[-._ 0-9]+")
DICT, STATE, INFO, INFOS, README = (
    "dataset_dict.json",
    "state.json",
    "dataset_info.json",
    "dataset_infos.json",
    "README.md",
)
NO_ROWS = (DICT, STATE, INFO, INFOS, "config.json")
LARGEST_README = 1 << 22  # bytes
SHOWN = 8  # maximum names in a message

Splits = Mapping[str, Sequence[Path]]


class Found(NamedTuple):
    """The files of a split. `name` does not depend on the spelling of the path; `others` are other splits and unread files."""

    name: str
    files: Sequence[Path]
    others: Sequence[str]


class Configs(NamedTuple):
    """The splits of each config of a data set, and the default config; "" if there is no default."""

    splits: Mapping[str, Splits]
    default: str

    @classmethod
    def of(cls, splits: Mapping[str, Splits], marked: str = "") -> Configs:
        """The default is the config marked as default, the one named `default`, or the only one."""
        only = next(iter(splits)) if len(splits) == 1 else ""
        return cls(splits, marked or only or (DEFAULT if DEFAULT in splits else ""))


def find(path: str) -> Found | None:
    """The files that a source's path selects; None if it is neither a data set folder nor inside one.

    Raises:
        UserError: the folder has no such split, or has several and no default, or lacks files.
    """
    whole = Path(os.path.expanduser(path))
    there = os.path.isdir(whole)
    if os.path.isfile(whole) or (kind_of(whole) and not there):
        return None
    for depth in (2, 1, 0):
        folder, names = whole, list[str]()
        for _ in range(depth):
            folder, names = folder.parent, [folder.name, *names]
        if not os.path.isdir(folder):
            continue
        configs, certain = _declared(folder, path), True
        if configs is None and (depth == 0 or not there):
            configs, certain = _by_names(folder, depth)
        chosen = _chosen(configs, names) if configs else None
        if configs and chosen:
            return _found(folder, configs, *chosen)
        if configs and (depth == 0 or (certain and not there and (depth == 1 or names[0] in configs.splits))):
            raise UserError(f"{path}: {_what_there_is(folder, configs, names)}")
    return None


def _found(folder: Path, configs: Configs, config: str, split: str) -> Found:
    files = configs.splits[config][split]
    name = "/".join([str(folder), *([config] if len(configs.splits) > 1 else []), split])
    if not files:
        raise UserError(f"{name}: the folder has no file of this split; fetch the data set again")
    _check_shards(files)
    in_splits = {file for splits in configs.splits.values() for some in splits.values() for file in some}
    unread = [str(file.relative_to(folder)) for file in _files_below(folder) if file not in in_splits]
    others = [*(other for other in configs.splits[config] if other != split), *unread]
    return Found(name, files, [*others[:SHOWN], *([f"and {len(others) - SHOWN} more"] if len(others) > SHOWN else [])])


def _chosen(configs: Configs, names: Sequence[str]) -> tuple[str, str] | None:
    """The config and split that the rest of the path names; None if they do not exist or are ambiguous."""
    config, *rest = names if names and names[0] in configs.splits else [configs.default, *names]
    splits = list(configs.splits.get(config, ()))
    meant = rest or ([TRAIN] if TRAIN in splits else splits)
    return (config, meant[0]) if len(meant) == 1 and meant[0] in splits else None


def _what_there_is(folder: Path, configs: Configs, names: Sequence[str]) -> str:
    asked = f"there is no {'/'.join(names)} in {folder}" if names else "it has several parts"
    config = names[0] if names and names[0] in configs.splits else configs.default
    kind, there = ("splits", list(configs.splits[config])) if config else ("configs", list(configs.splits))
    begun = f"{folder}/{config}" if config and len(configs.splits) > 1 else folder
    if not there:
        return f"the files in {begun} declare no {kind}; fetch the data set again"
    return f"{asked}; the {kind} are {', '.join(there[:SHOWN])}: name one, as {begun}/{there[0]}"


def _check_shards(files: Sequence[Path]) -> None:
    """Raise UserError if shards are missing: five must exist for `train-00001-of-00005.parquet`."""
    shards = {(file.parent, match[1], match[3]) for file in files if (match := NUMBERED.match(file.name))}
    for folder, begun, count in sorted(shards):
        matches = [match for file in folder.iterdir() if (match := NUMBERED.match(file.name))]
        there = {match[2] for match in matches if (match[1], match[3]) == (begun, count)}
        if missing := sorted({f"{number:05}" for number in range(int(count))} - there):
            raise UserError(
                f"{folder}: {len(missing)} of {int(count)} files are missing, the first {begun}-{missing[0]}-of-{count}; fetch "
                "the data set again"
            )


# ---- splits declared by files -----------------------------------------------------------------------------------------


def _declared(folder: Path, path: str) -> Configs | None:
    """The configs that files in the folder declare; None without such files."""
    if (folder / DICT).is_file():
        names = _json(folder / DICT, path).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_inside(name) for name in names):
            raise UserError(f"{path}: {folder / DICT} must list the names of the splits")
        return Configs.of({DEFAULT: {name: _saved(folder / name, path)[1] for name in names}})
    if (folder / STATE).is_file():
        split, files = _saved(folder, path)
        return Configs.of({DEFAULT: {split: files}})
    configs = _front_matter(folder).get("configs")
    if not isinstance(configs, list) or not all(isinstance(one, dict) and one.get("config_name") for one in configs):
        return None
    marked = [str(one["config_name"]) for one in configs if one.get("default")]
    return Configs.of({str(one["config_name"]): _of_config(folder, one, path) for one in configs}, *marked[:1])


def _saved(folder: Path, path: str) -> tuple[str, list[Path]]:
    """The split and the files of a data set that the library saved into the folder."""
    state = _json(folder / STATE, path)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{path}: {folder} holds a selection of rows by index; call flatten_indices() before save_to_disk"
        )
    listed = state.get("_data_files")
    files = [isinstance(one, dict) and one.get("filename") for one in listed] if isinstance(listed, list) else []
    if not files or not all(isinstance(name, str) and _is_inside(name) for name in files):
        raise UserError(f"{path}: {folder / STATE} must list the files of the data set, and none outside its folder")
    for name in files:
        if not os.path.isfile(folder / str(name)):  # False for a name that is too long; Path.is_file raises
            raise UserError(f"{path}: {folder / str(name)} is missing; save or copy the data set again")
    return str(state.get("_split") or TRAIN), [folder / str(name) for name in files]


def _of_config(folder: Path, config: Mapping[str, Any], path: str) -> Splits:
    """The splits of one of the README's configs."""
    inside, given = str(config.get("data_dir") or "."), config.get("data_files")
    if not _is_inside(inside):
        raise UserError(f"{path}: {folder / README}: data_dir {inside!r:.80} is outside of this folder")
    if given is None:
        return next(iter(by_files(folder / inside, _files_below(folder / inside)).values()), {})
    listed = given if isinstance(given, list) else [given]
    if isinstance(given, dict):
        listed = [{"split": split, "path": paths} for split, paths in given.items()]
    splits: dict[str, list[Path]] = {}
    for one in listed:
        split, paths = (one.get("split"), one.get("path")) if isinstance(one, dict) else (TRAIN, one)
        for pattern in paths if isinstance(paths, list) else [paths]:
            if not isinstance(pattern, str) or not _is_inside(pattern):
                raise UserError(
                    f"{path}: {folder / README}: data_files {pattern!r:.80} must be a pattern inside this folder"
                )
            matches = sorted(glob.glob(str(Path(inside) / pattern), root_dir=folder, recursive=True))
            splits.setdefault(str(split), []).extend(file for match in matches for file in _files_at(folder / match))
    return splits


def _front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the top of the README; empty if there is none."""
    file = folder / README
    if not file.is_file() or file.stat().st_size > LARGEST_README:
        return {}
    parts = re.split(r"^---\s*$", file.read_text("utf-8", errors="replace"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip("\ufeff \n"):
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # the two lines may be rules of Markdown
        return {}
    return found if isinstance(found, dict) else {}


def _json(file: Path, path: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: {file} is missing; save or copy the data set again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {file} cannot be read: {error!s:.120}") from error
    return found if isinstance(found, dict) else {}


def _is_inside(name: str) -> bool:
    """Whether a name or pattern stays in its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "://" not in name


# ---- splits by file names ---------------------------------------------------------------------------------------------


def _by_names(folder: Path, depth: int) -> tuple[Configs | None, bool]:
    """The configs that file and folder names imply, and whether the folder is certainly a data set.

    Without shard names or other signs of a data set, it is a plain folder of files: its splits count only if the path
    names one (`depth` 1).
    """
    direct, inside = ([file for file in sorted(one.glob("*")) if _has_rows(file)] for one in (folder, folder / "data"))
    certain = (
        any((folder / name).is_file() for name in (INFO, INFOS))
        or "dataset_info" in _front_matter(folder)
        or any(SHARD.fullmatch(file.name) for file in inside)
        or any(_split_of_shard(Path(file.name)) for file in direct)
    )
    if certain or (depth == 0 and not direct):
        files = _files_below(folder)
        found = by_files(folder, files) or ({DEFAULT: {TRAIN: files}} if files else {})
    else:
        found = by_files(folder, direct or inside) if depth == 1 else {}
    return (Configs.of(found) if found else None), certain


def by_files(folder: Path, files: Sequence[Path]) -> dict[str, Splits]:
    """The splits implied by file and folder names, by the datasets library's rules; empty if there are none."""
    for split_of in (_split_of_shard, _split_of_folders, _split_of_name):
        found: dict[str, dict[str, list[Path]]] = {}
        for file in files:
            if split := split_of(file.relative_to(folder)):
                found.setdefault(_config_of(file.relative_to(folder)), {}).setdefault(split, []).append(file)
        if found:
            return dict(found)
    return {}


def _config_of(file: Path) -> str:
    """The folders above a file, without `data` and those that name its split."""
    return "/".join(part for part in file.parts[:-1] if part != "data" and not _keyword(part)) or DEFAULT


def _split_of_shard(file: Path) -> str:
    shard = SHARD.fullmatch(file.name)
    return shard[1] if shard and (file.parent.name == "data" or _keyword(shard[1])) else ""


def _split_of_folders(file: Path) -> str:
    return next((split for part in file.parts[:-1] if (split := _keyword(part))), "")


def _split_of_name(file: Path) -> str:
    return _keyword(file.name)


def _keyword(name: str) -> str:
    """The split that a word of the name stands for; the first of train, validation, test."""
    meant = {KEYWORDS[word] for word in WORD_ENDS.split(name) if word in KEYWORDS}
    return next((split for split in dict.fromkeys(KEYWORDS.values()) if split in meant), "")


def _files_at(path: Path) -> list[Path]:
    """The data file at a path, or the data files below it."""
    return _files_below(path) if path.is_dir() else [path] if _has_rows(path) else []


def _files_below(folder: Path) -> list[Path]:
    """The visible data files in a folder and its subfolders; `.json` files only if there are no others."""
    found = [
        file
        for file in (sorted(folder.rglob("*")) if os.path.isdir(folder) else ())
        if _has_rows(file) and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    ]
    return [file for file in found if kind_of(file) != ".json"] or found


def _has_rows(file: Path) -> bool:
    return kind_of(file) is not None and file.name not in NO_ROWS and file.is_file()
