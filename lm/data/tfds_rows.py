"""Rows of a TFDS split as JSON lines, read from ArrayRecord without TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.builders import BUILDERS, find_builder
from lm.experiment import UserError


def find(name: str, data_dir: str | Path | None = None) -> tuple[list[Path], Callable[[], Iterator[bytes]]]:
    """(files, function that yields JSON lines) of `NAME/SPLIT`, NAME as in TFDS (`builder`, `builder/config`, `…:version`).

    This project's builders are prepared on first use; others must be prepared as ArrayRecord already.
    """
    name, _, split = name.rpartition("/")
    if not name:
        raise UserError(f"tfds:{split}: say which split, as in tfds:{split}/train")
    builder = _builder(name, data_dir)
    if split not in builder.info.splits:
        raise UserError(f"tfds:{name}/{split}: no split {split!r}; the splits are {', '.join(builder.info.splits)}")

    def lines() -> Iterator[bytes]:
        for example in builder.as_data_source(split):
            yield json.dumps(_plain(example), sort_keys=True).encode() + b"\n"

    return [Path(file) for file in builder.info.splits[split].filepaths], lines


def _builder(name: str, data_dir: str | Path | None) -> Any:
    import tensorflow_datasets as tfds

    base, _, config = name.partition("/")
    ours = find_builder(base)
    if ours is not None:
        kwargs = {"config": config} if config else {}
        try:
            builder = ours(data_dir=data_dir, file_format="array_record", **kwargs)
        except ValueError as error:
            raise UserError(f"tfds:{name}: {str(error).splitlines()[0]}") from error
        builder.download_and_prepare()
        return builder
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError) as error:
        raise UserError(
            f"tfds:{name}: cannot be opened ({str(error).splitlines()[0]}); lm itself has {', '.join(BUILDERS)}"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"tfds:{name}: not prepared in {builder.data_dir}; run its download_and_prepare() "
            "with file_format='array_record'"
        )
    return builder


def _plain(value: Any) -> Any:
    """Convert TFDS values to JSON values: bytes to str, arrays and scalars to lists and numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
