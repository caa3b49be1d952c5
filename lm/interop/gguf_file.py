"""Reads metadata and tensors of GGUF files with the package gguf, which the extra `gguf` installs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lm.experiment import UserError
from lm.extras import install_command
from lm.interop.tensors import LFS, Tensor

MOST_ITEMS = 2**21
"""Maximum length of an array in the metadata, above the largest vocabularies; a damaged length would be read for hours."""


def package() -> ModuleType:
    """The package gguf. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise UserError(f"GGUF files need the package gguf: {install_command('gguf')}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by name. Raises UserError if it cannot be read."""
    return _read(*_version(path))[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file by name; `read` dequantises them to float32. Raises UserError if the file cannot be read."""
    return _read(*_version(path))[1]


def _version(path: Path) -> tuple[Path, int, int]:
    """A key that changes when the file changes."""
    if not path.is_file():
        raise UserError(f"{path} is no file that can be read; name a .gguf file")
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=2)
def _read(path: Path, changed: int, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = _reader_class()
    try:
        with path.open("rb") as stream:
            if stream.read(len(LFS)) == LFS:
                raise UserError(f"{path} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it")
        opened = reader(path)
        metadata = {name: field.contents() for name, field in opened.fields.items()}
        return metadata, {one.name: _tensor(path, one) for one in opened.tensors}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is not a complete GGUF file: {said:.200}: fetch it again") from error


def _reader_class() -> type:
    """The package's reader with checks for a truncated or damaged file."""

    class CheckedReader(package().GGUFReader):  # type: ignore[misc]
        """Raises ValueError for a file that is shorter than it declares."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> np.ndarray:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it ends after {len(self.data):,} bytes, before its last value")
            return super()._get(offset, dtype, count, *rest, **more)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind == package().GGUFValueType.ARRAY and (count := self._get(offset + 4, np.uint64)[0]) > MOST_ITEMS:
                raise ValueError(f"an array of {count} values")
            return super()._get_field_parts(offset, kind)

    return CheckedReader


def _tensor(path: Path, one: Any) -> Tensor:
    shape = tuple(int(size) for size in reversed(one.shape))
    return Tensor(path, shape, "F32", _dequantised(path, one, shape))


def _dequantised(path: Path, one: Any, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            return package().dequantize(one.data, one.tensor_type).reshape(shape)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{path}: {one.name} is {one.tensor_type.name}, which is not supported: {error}") from error

    return read
