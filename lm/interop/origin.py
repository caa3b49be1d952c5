"""Parts of an open model's folder that an export of a model trained from it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.interop.tensors import read_folder


@dataclass(frozen=True)
class Origin:
    """The text of config.json, and the file and dtype of every tensor by name."""

    config: str
    tensors: dict[str, tuple[str, str]]


def read_origin(folder: Path) -> Origin:
    """Read the origin from a published model's folder. Raises UserError if its files are incomplete."""
    tensors = {name: (one.file.name, one.dtype) for name, one in read_folder(folder).items()}
    return Origin((folder / "config.json").read_text(encoding="utf-8"), tensors)
