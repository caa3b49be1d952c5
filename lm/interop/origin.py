"""Parts of an open model's files that an export of a model trained from it keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.interop.tensors import read_folder
from lm.shapes import is_text, list_of, misfit
from lm.stored import read_record

TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # of use, which go wherever the weights go
VOCABULARY = ("vocab.json", "merges.txt")  # a tokenizer.json in the form that older programs read


@dataclass(frozen=True)
class Origin:
    """The text of config.json, the file and dtype of every tensor by name, and files to copy.

    tensors: empty for weights in another format than the export's.
    files: bytes by name, as text in Latin-1, which JSON can hold.
    """

    config: str
    tensors: Mapping[str, tuple[str, str]]
    files: Mapping[str, str] = field(default_factory=dict)


def stored_origin(path: Path) -> Origin:
    """Read an origin that a run stored. Raises UserError if the file is damaged, or names files outside the export's folder."""
    found = read_record(path, {"config": _is_config, "tensors": {"*": list_of(2, _is_name)}, "files?": _are_files})
    return Origin(found["config"], found["tensors"], found.get("files", {}))


def _is_config(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError, RecursionError):
        return False


def _are_files(found: Any) -> bool:
    whole = misfit(found, {"*": is_text}) == "" and all(map(_is_name, found))
    return whole and all(max(text, default="") < "\u0100" for text in found.values())


def _is_name(name: Any) -> bool:
    """Whether a value can be the name of a file in a folder."""
    return isinstance(name, str) and Path(name).name == name != "" and "\0" not in name and name != ".."


def read_origin(folder: Path, tokenizer: Path | None = None) -> Origin:
    """Read the origin from a published model's folder.

    Args:
        tokenizer: folder of the model's tokenizer; None: the same.

    Raises:
        UserError: its files are incomplete.
    """
    tensors = {name: (one.file.name, one.dtype) for name, one in read_folder(folder).items()}
    copied = [file for name in TERMS for file in folder.glob(name)]
    copied += [(tokenizer or folder) / name for name in VOCABULARY]
    files = {file.name: file.read_bytes().decode("latin-1") for file in copied if file.is_file()}
    return Origin((folder / "config.json").read_text(encoding="utf-8"), tensors, files)
