"""Parquet and Arrow files: blocks of rows (row groups, record batches), and their columns as Python values."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from lm.data import json_text
from lm.experiment import UserError

KINDS = (".parquet", ".arrow")
GROUP = 1 << 32  # offset of a row: number of its block * GROUP + index in the block
UNREADABLE = (ValueError, OverflowError, ArithmeticError, NotImplementedError)  # errors of pyarrow for a single value
LIBRARY = b"huggingface"  # key of the schema's metadata under which the datasets library describes the columns

AT_ONCE = 1 << 16  # maximum rows located at once (at least those of a block)

SCHEMAS = 256  # files whose schemas are kept

Spans = Int64[np.ndarray, "N 3"]
Converter = Callable[[Any], Any]


@contextlib.contextmanager
def _damaged(name: str, what: str) -> Iterator[None]:
    """Context that turns pyarrow's error on a damaged file into one line."""
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{name}: {what} ({' '.join(str(error).split()):.150})") from error


def _parquet(name: str, file: Path) -> Any:
    import pyarrow.parquet

    with _damaged(name, "not a parquet file"):
        return pyarrow.parquet.ParquetFile(file)


@functools.lru_cache(maxsize=16)
def _batches(name: str, file: Path, changed: int) -> tuple[Any, list[Any]]:
    """The schema and record batches of an Arrow file or stream, mapped into memory; compressed ones are unpacked."""
    import pyarrow

    with _damaged(name, "not a complete Arrow file"):
        source = pyarrow.memory_map(str(file))
        try:
            found = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            return stream.schema, list(stream)
        return found.schema, [found.get_batch(number) for number in range(found.num_record_batches)]


@functools.lru_cache(maxsize=SCHEMAS)
def schema_of(name: str, file: Path, changed: int) -> Any:
    """The file's Arrow schema; `changed` is its mtime. Raises UserError if the file is damaged or a column appears twice."""
    is_parquet = file.name.endswith(".parquet")
    schema = _parquet(name, file).schema_arrow if is_parquet else _batches(name, file, changed)[0]
    with _damaged(name, "its columns have names that cannot be read"):
        names = [_name(field) for field in schema]
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise UserError(f"{name}: the column {twice[0]!r:.60} appears twice")
    return schema


def _name(field: Any) -> str:
    """A field's name, after reading those in it. Raises UnicodeDecodeError if one of them is no text."""
    import pyarrow.types as types

    if types.is_nested(field.type):
        for number in range(field.type.num_fields):
            _name(field.type.field(number))
    return field.name


def locate(name: str, file: Path) -> Iterator[Spans]:
    """The spans of the rows: place, average size in bytes, and no line."""
    schema_of(name, file, file.stat().st_mtime_ns)
    with _damaged(name, f"not a whole {file.suffix.removeprefix('.')} file"):
        if file.name.endswith(".parquet"):
            metadata = _parquet(name, file).metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            blocks = [(group.num_rows, group.total_byte_size) for group in groups]
        else:
            batches = _batches(name, file, file.stat().st_mtime_ns)[1]
            for one in batches:
                one.validate()  # the size of lists at offsets that a damaged file gives would end the process
            blocks = [(len(one), one.nbytes) for one in batches]
    many, waiting = list[np.ndarray](), 0
    for number, (rows, size) in enumerate(blocks):
        spans = np.zeros((rows, 3), np.int64)
        spans[:, 0] = number * GROUP + np.arange(rows)
        spans[:, 1] = size // max(1, rows)
        many.append(spans)
        waiting += rows
        if waiting >= AT_ONCE or number == len(blocks) - 1:
            yield np.concatenate(many)
            many, waiting = [], 0


@functools.lru_cache(maxsize=2)
def block(name: str, file: Path, changed: int, number: int, left_out: tuple[str, ...] = ()) -> Any:
    """A row group or record batch as a table without some columns; `changed` is the file's mtime."""
    if file.name.endswith(".parquet"):
        with _damaged(name, f"damaged in row group {number}"):
            opened = _parquet(name, file)
            kept = [column for column in opened.schema_arrow.names if column not in left_out]
            return opened.read_row_group(number, columns=kept if left_out else None)
    import pyarrow

    batch = _batches(name, file, changed)[1][number]
    with _damaged(name, f"damaged in record batch {number}"):
        batch.validate(full=True)  # reading text or lists at offsets that a damaged file gives would end the process
    return pyarrow.Table.from_batches([batch]).drop_columns(list(left_out))


@functools.lru_cache(maxsize=SCHEMAS)
def bytes_columns(name: str, file: Path, changed: int, named: frozenset[str]) -> tuple[str, ...]:
    """The columns of images, audio or other bytes, except those in `named`."""
    return tuple(one.name for one in schema_of(name, file, changed) if one.name not in named and _has_bytes(one.type))


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    inner = [kind.field(number).type for number in range(kind.num_fields)] if types.is_nested(kind) else []
    return any(map(_has_bytes, inner))


def python_columns(table: Any, converters: Mapping[str, Converter | None]) -> dict[str, list[Any]]:
    """The values of each column; an unreadable value is replaced by its exception.

    A null field of a struct is left out, because Arrow cannot distinguish it from a missing field (`content` is kept). Types
    of the datasets library are converted: JSON stored as text is parsed, and a ClassLabel becomes the name of its class
    (except in the column `label`, a flag).
    """
    columns = zip(table.column_names, table.columns, strict=True)
    return {name: _values(column, converters[name]) for name, column in columns}


@functools.lru_cache(maxsize=SCHEMAS)
def converters_of(name: str, file: Path, changed: int) -> Mapping[str, Converter | None]:
    """For each column of a file, the function that converts its values to those of JSON rows."""
    schema = schema_of(name, file, changed)
    features = _features(schema)
    return {field.name: _converter(field.type, features.get(field.name), field.name == "label") for field in schema}


def _values(column: Any, convert: Converter | None) -> list[Any]:
    def value(one: Any) -> Any:
        try:
            return convert(one.as_py()) if convert else one.as_py()
        except UNREADABLE as error:
            return error

    try:
        values = column.to_pylist()
        return values if convert is None else list(map(convert, values))
    except UNREADABLE:
        return list(map(value, column))


def _features(schema: Any) -> Mapping[str, Any]:
    """The datasets library's description of the columns; empty if there is none."""
    try:
        features = json.loads((schema.metadata or {}).get(LIBRARY, b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _converter(kind: Any, feature: Any, as_flag: bool = False) -> Converter | None:
    """The function that converts a pyarrow value to a value of a JSON row; None if they are the same."""
    import pyarrow
    import pyarrow.types as types

    noted = feature if isinstance(feature, dict) else {}
    if noted.get("_type") == "Json" or isinstance(kind, getattr(pyarrow, "JsonType", ())):
        return lambda value: json_text.loads(value) if isinstance(value, str) else value
    if noted.get("_type") == "ClassLabel" and isinstance(noted.get("names"), list) and not as_flag:
        names = dict(enumerate(noted["names"]))
        return lambda value: names.get(value) if isinstance(value, int) else value
    if types.is_map(kind):
        return lambda value: None if value is None else dict(value)
    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        of_field = {field.name: _converter(field.type, noted.get(field.name)) for field in fields}
        return functools.partial(_struct, of_field)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = noted.get("feature") if noted else feature[0] if isinstance(feature, list) and feature else None
        of_item = _converter(kind.value_type, inner)
        return of_item and (lambda values: None if values is None else [of_item(value) for value in values])
    return None


def _struct(of_field: Mapping[str, Converter | None], value: Any) -> Any:
    if value is None:
        return None
    kept = ((name, item) for name, item in value.items() if item is not None or name == "content")
    return {name: convert(item) if (convert := of_field[name]) else item for name, item in kept}
