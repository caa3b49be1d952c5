"""Trajectory files: every trajectory that a stage sampled, one Parquet file per step, in the stage's folder `trajectories`.

`step-00000012-1a2b3c4d.parquet` belongs to step 12 and has the CRC-32 1a2b3c4d, by which damage is detected. A file is a
function of the experiment and its step: a resumed run writes a lost file again with the same content. The oldest files
are removed when all together exceed `trajectory_mb`, so that the files kept do not depend on kills. `_kept.json` names the files
that are kept, so that a missing one is noticed. Without its folder `trajectories` a stage has none.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lm.config.field import UserError
from lm.shapes import is_text
from lm.stored import read_record, write_atomic, write_sealed

FOLDER = "trajectories"
KEPT = "_kept.json"  # readers of a folder of Parquet files leave out names that begin with _
REMEDY = "put back a copy, or remove the folder"

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("author", pa.string())])
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),  # number of the prompt within the step
        ("task", pa.string()),  # the row of the data, as JSON
        ("messages", pa.list_(MESSAGE)),
        ("tokens", pa.list_(pa.int32())),
        ("authors", pa.list_(pa.int8())),
        ("logp", pa.list_(pa.float32())),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("reward", pa.float32()),
        ("advantage", pa.float32()),
        ("trained", pa.bool_()),  # whether an update used it
        ("version", pa.int32()),
        ("finish", pa.string()),
        # Of trajectories in the batches, 0 on tokens that the model did not sample; null: not computed.
        ("trainer_logp", pa.list_(pa.float32())),  # the trainer's, before the step's first update
        ("ref_logp", pa.list_(pa.float32())),  # the reference's, for a KL penalty
        ("token_advantages", pa.list_(pa.float32())),  # where the tokens of a trajectory have different ones
        ("largest_gap", pa.float32()),  # largest |logp - trainer_logp|
        ("sampled", pa.int32()),  # number of tokens that the model sampled
        # number of messages marked as errors: by the environment, or a last call whose reply had no room
        ("errors", pa.int32()),
    ]
)
OPTIONAL = ("trainer_logp", "ref_logp", "token_advantages", "largest_gap", "sampled", "errors")
"""Columns of SCHEMA that may be null, or missing in a file of an older lm."""
TOKEN_COLUMNS = ("authors", "logp", *OPTIONAL[:3])


def trajectory_files(folder: Path) -> list[Path]:
    """The trajectory files in a stage's folder, ordered by step."""
    return sorted((folder / FOLDER).glob("step-*.parquet"))


def step_of(path: Path) -> int:
    """The step of a trajectory file, from its name. Raises UserError for a name that has none."""
    named = re.fullmatch(r"step-(\d{8,18})-[0-9a-f]{8}\.parquet", path.name, re.ASCII)
    if named is None:
        raise UserError(f"{path} has a name that no trajectory file has: step-00000012-1a2b3c4d.parquet; move it away")
    return int(named[1])


def write_step_file(folder: Path, step: int, content: bytes) -> Path:
    """Write the Parquet file of a step, named by the step and its CRC-32, into a folder (made if missing); returns its path.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / f"step-{step:08}-{zlib.crc32(content):08x}.parquet"
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        return write_atomic(path, content)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; fix that and run the same command again to resume from the "
            "last checkpoint"
        ) from error


def keep_only(folder: Path, kept: Collection[Path]) -> None:
    """Remove a stage's other trajectory files, after recording those that are kept. Raises UserError if that cannot be written."""
    others = set(trajectory_files(folder)) - set(kept)
    record = folder / FOLDER / KEPT
    with _writing(record):
        write_sealed(record, {"files": sorted(path.name for path in kept)})
    for path in others:
        path.unlink()


def rewind_trajectories(folder: Path, step: int) -> None:
    """Remove the files of later steps, which will be sampled again, and temporary files that a kill left."""
    for draft in (folder / FOLDER).glob("*.tmp"):
        draft.unlink()
    if files := trajectory_files(folder):
        keep_only(folder, [path for path in files if step_of(path) <= step])


def check_kept(folder: Path) -> None:
    """Raise UserError if a trajectory file that a stage kept is missing; an older lm did not record which it kept."""
    record = folder / FOLDER / KEPT
    if not record.exists():
        return
    named = _named(record)
    lost = sorted({*named} - {path.name for path in trajectory_files(folder)})
    if lost and named == _named(record):  # the run may just have removed the file, and recorded it before
        raise UserError(
            f"{folder / FOLDER} has {len(named) - len(lost)} of the {len(named)} trajectory files that the stage kept, and "
            f"lacks {lost[0]}: put back copies of the others, or remove the folder"
        )


def _named(record: Path) -> list[str]:
    return read_record(record, {"files": [is_text]}, REMEDY)["files"]


def check_trajectories(folder: Path) -> None:
    """Raise UserError if a trajectory file is damaged or missing."""
    check_kept(folder)
    for path in trajectory_files(folder):
        read_sealed_file(path)


def read_trajectories(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a trajectory file: all columns of SCHEMA, or these.

    Raises:
        UserError: the file is damaged, or cannot be read.
    """
    return read_columns(path, columns).to_pylist()


def read_columns(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read columns of a trajectory file, or all of SCHEMA, in its types; one that an older lm did not write is null.

    Raises:
        UserError: the file is damaged, cannot be read, or is not one of this step's trajectories.
    """
    content = read_sealed_file(path)
    try:
        table = read_table(content, pa.schema([SCHEMA.field(name) for name in columns or SCHEMA.names]), OPTIONAL)
        if "step" in table.column_names and set(table["step"].to_pylist()) - {step_of(path)}:
            raise ValueError("it has another step than its name")
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged: it is no Parquet file of trajectories ({why:.100}); remove the folder"
        ) from error


def read_table(content: bytes, schema: pa.Schema, optional: Collection[str] = ()) -> pa.Table:
    """The columns of a Parquet file that a schema names, in its types.

    Args:
        optional: columns that may have nulls, or be missing, and are null then.

    Raises:
        ArrowException, OSError, ValueError: it is another file, whose columns differ.
    """
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        names = file.schema_arrow.names
        table = file.read([name for name in schema.names if name in names])
        if len(table) != file.metadata.num_rows:
            raise ValueError(f"it has {len(table)} of its {file.metadata.num_rows} rows")
    table.validate(full=True)
    columns = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        if names.count(name) != 1 and (name in names or name not in optional):
            raise ValueError(f"it has {names.count(name)} columns {name}")
        column = table[name].cast(kind).combine_chunks() if name in names else pa.nulls(len(table), kind)
        if _has_nulls(column.drop_null() if name in optional else column):
            raise ValueError(f"its {name} has nulls")
        numbers = column.flatten() if name == "tokens" else column
        if pa.types.is_integer(numbers.type) and (pc.min(numbers).as_py() or 0) < 0:
            raise ValueError(f"its {name} is negative")
        columns[name] = column
    for name in [name for name in TOKEN_COLUMNS if name in columns and "tokens" in columns]:
        same = pc.equal(pc.list_value_length(columns[name]), pc.list_value_length(columns["tokens"]))
        if pc.any(pc.invert(same)).as_py():
            raise ValueError(f"its {name} are not one for each token")
    return pa.table(columns)


def _has_nulls(array: pa.Array) -> bool:
    """Whether an array or a part of its values is null."""
    if array.null_count:
        return True
    if pa.types.is_map(array.type):
        return _has_nulls(array.keys) or _has_nulls(array.items)
    parts = array.flatten() if pa.types.is_nested(array.type) else []
    return any(map(_has_nulls, parts if isinstance(parts, list) else [parts]))


def read_sealed_file(path: Path, remedy: str = REMEDY) -> bytes:
    """The content of a file with its CRC-32 in its name. Raises UserError, with the remedy, if it is damaged or missing."""
    step_of(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if f"{zlib.crc32(content):08x}" != path.stem.split("-")[-1]:
        raise UserError(f"{path} is damaged, it does not match the checksum in its name: {remedy}")
    return content
