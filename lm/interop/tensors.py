"""Tensors in a folder of safetensors files: names, shapes and dtypes, and a check that the files are complete."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lm.experiment import UserError
from lm.stored import read_json, unrepeated

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
}  # fmt: skip
"""Supported dtypes of weights, in the order of the tensors in a file; the others are integers or need scales."""
READ = tuple(DTYPES)
LFS = b"version https://git-lfs"
MOST_NAMED = 10
LARGEST_HEADER = 10**8  # bytes, of the format
BLOCK = 3 * 2**20  # bytes that are read at a time
CACHED = 2**16  # values processed at a time, so that temporary copies stay in the CPU's cache
EXPONENT = 0x7F80  # exponent bits of a bfloat16; all are set if the value is not finite


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its metadata, and `read`, which returns its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    offset: int | None = None  # of the values in the file; None if they must be converted

    def blocks(self, part: tuple[slice, ...] = ()) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, values) of a part of a vector or matrix, some megabytes at a time; each block reuses the memory.

        Raises:
            UserError: the file was cut short while it was read.
        """
        part = part or tuple(slice(0, size) for size in self.shape)
        if self.offset is None or not part:
            yield 0, self.read()[part]
            return
        (first, last), dtype = (part[0].start, part[0].stop), DTYPES[self.dtype]
        width, (left, right) = (self.shape[1], (part[1].start, part[1].stop)) if part[1:] else (1, (0, 1))
        count = max(1, BLOCK // ((right - left) * dtype.itemsize))
        memory = np.empty((min(count, last - first), right - left), dtype)
        with self.file.open("rb", buffering=0) as stream:
            for start in range(first, last, count):
                block = memory[: last - start]
                # Whole rows are contiguous in the file.
                runs = block.reshape(1, -1) if right - left == width else block
                for number, run in enumerate(runs):
                    stream.seek(self.offset + ((start + number) * width + left) * dtype.itemsize)
                    if stream.readinto(run.view(np.uint8).data) != run.nbytes:
                        raise UserError(f"{self.file} was cut short while it was read: fetch it again")
                yield start - first, block if part[1:] else block[:, 0]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def finite(self, name: str, dtype: Any = None) -> np.ndarray:
        """The values in `dtype` (None: the file's). Raises UserError if a value is NaN, infinite or too large for it."""
        given = self.read()
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is counted below
            value = given.astype(dtype or given.dtype, order="C", copy=False)
        if broken := broken_values(value):
            raise UserError(
                f"{self.file}: {name} has {broken} of {value.size} values that are not finite in {value.dtype}"
            )
        return value


def broken_values(values: np.ndarray) -> int:
    """Number of values that are not finite."""
    flat, is_bfloat16 = values.reshape(-1), values.dtype == ml_dtypes.bfloat16
    count = 0
    for start in range(0, flat.size, CACHED):
        some = flat[start : start + CACHED]
        # Ten times as fast as isfinite for bfloat16.
        broken = (some.view(np.uint16) & EXPONENT) == EXPONENT if is_bfloat16 else ~np.isfinite(some)
        count += int(np.count_nonzero(broken))
    return count


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, from the files in its index; without an index, from all *.safetensors files.

    Raises:
        UserError: there is no file, one is missing, damaged or not in the index, or a tensor is in two files.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    places = _read_index(index) if index.exists() or index.is_symlink() else None
    if places is not None:
        files = _indexed(folder, places, files)
    if not files:
        raise UserError(_why_no_files(folder))
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            if name in found:
                raise UserError(
                    f"{folder}: {name} is in both {found[name].file.name} and {file.name}: remove one of them"
                )
            if places is not None and places.get(name) != file.name:
                where = f"places it in {places[name]}" if name in places else "does not have it"
                raise UserError(f"{file} has {name}, but {INDEX} {where}: fetch both again")
            found[name] = tensor
    missing = [name for name in places or () if name not in found]
    if missing:
        raise UserError(f"{folder / INDEX} lists {listed(missing)}, missing from the files")
    return found


def _why_no_files(folder: Path) -> str:
    """What to do about a folder without safetensors files."""
    pickled = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt", "*.ckpt") for file in folder.glob(kind))
    if not pickled:
        return f"{folder} has no *.safetensors file; the download is incomplete"
    said = f"{folder} has no *.safetensors file; {pickled[0]} is a pickle, which is not read: convert it with transformers, "
    if any(name.startswith("consolidated.") for name in pickled):
        return f"{said}python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir {folder} --output_dir NEW"
    return (
        f"{said}python -c 'from transformers import AutoModelForCausalLM as M; "
        f'M.from_pretrained("{folder}").save_pretrained("NEW")\''
    )


def refuse_tensors(
    where: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], given: str
) -> None:
    """Raise UserError unless the tensors have the wanted names, shapes and a supported dtype; it lists all differences.

    Args:
        where: first words of the message.
        wanted: shapes by name.
        given: the source of the shapes, for the message.
    """
    both = [name for name in wanted if name in tensors]
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected, which the model does not have": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} ({given} makes it {list(wanted[name])})"
            for name in both
            if tensors[name].shape != wanted[name]
        ],
        f"of a dtype other than {', '.join(READ)}": [
            f"{name} {tensors[name].dtype}" for name in both if tensors[name].dtype not in READ
        ],
    }
    said = [
        f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {listed(names)}"
        for what, names in faults.items()
        if names
    ]
    if said:
        raise UserError(f"{where}: {'; '.join(said)}")


def write_file(path: Path, tensors: Mapping[str, Tensor], written: Callable[[int], None] = lambda size: None) -> None:
    """Write a safetensors file with one tensor in memory at a time; the bytes equal those that the library writes.

    Args:
        tensors: each is written in its `dtype`, which may differ from the dtype of its values.
        written: called after each tensor with its number of bytes.

    Raises:
        UserError: a value is not finite, or too large for the dtype.
    """
    order = sorted(tensors, key=lambda name: (READ.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        one, start, end = tensors[name], end, end + tensors[name].bytes
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            one = tensors[name]
            stream.write(one.finite(name, DTYPES[one.dtype]).reshape(-1).view(np.uint8).data)
            written(one.bytes)
        stream.flush()
        os.fsync(stream.fileno())


def listed(names: Iterable[str]) -> str:
    """Names in one line: the first ten, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f"{name if name.isprintable() else repr(name):.120}" for name in names[:MOST_NAMED]) + more


def _read_index(path: Path) -> dict[str, str]:
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise UserError(f"{path} is no file that can be read")
    content = read_json(path)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{path} has no weight_map of tensors and their files: restore it, or remove it")
    return places


def _indexed(folder: Path, places: dict[str, str], files: list[Path]) -> list[Path]:
    """The files that an index lists. Raises UserError if one is missing or outside the folder, or if there are others."""
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name or "\\" in name or "\0" in name]
    if outside:
        raise UserError(f"{folder / INDEX} lists {outside[0]!r:.80}; it should be a file in the same folder")
    missing = [name for name in names if not os.path.exists(folder / name)]  # False for a name that is too long
    if missing:
        raise UserError(f"{folder} lacks {listed(missing)}, which {INDEX} lists")
    stale = [file.name for file in files if file.name not in names]
    if stale:
        raise UserError(
            f"{folder} has {listed(stale)}, which {INDEX} does not list: move files that are not part of the model away"
        )
    return [folder / name for name in names]


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is no file that can be read")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS))
        if start == LFS:
            raise UserError(f"{path} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it")
        opened = safe_open(path, framework="numpy")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        shapes = {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}
        offsets = _offsets(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, OverflowError, ValueError, MemoryError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} is not a complete safetensors file: {why:.200}: fetch it again") from error

    def reading(name: str) -> Callable[[], np.ndarray]:
        return lambda: opened.get_tensor(name)

    return {name: Tensor(path, shape, dtype, reading(name), offsets[name]) for name, (shape, dtype) in shapes.items()}


def _offsets(path: Path) -> dict[str, int]:
    """The offset of each tensor in a safetensors file. Raises ValueError if the header cannot be read."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"its header has {size} bytes")
        header = json.loads(stream.read(size), object_pairs_hook=unrepeated)
    return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}
