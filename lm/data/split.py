"""Which rows are held out: a row's key is what it asks, and a hash of the key says on which side of the split it is.

Rows with the same key are on the same side, in any file, order, process and layout, whatever their other columns say.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from lm.data.layouts import canonical

TEXT_COLUMNS = ("text", "messages", "prompt", "chosen", "rejected", "completion")  # of canonical rows
ASKING_COLUMNS = ("prompt", "messages", "chosen")  # of a conversation in `chosen` what its first user turn asks

ALWAYS_TRAINED = "never held out"  # a key of rows that no split holds out

Places = Float64[np.ndarray, " N"]


def split_key(row: Mapping[str, Any]) -> str:
    """What a row is held out by: its `key` unless that is null, else what it asks, else its texts.

    Other columns (an id, a source, a date) are no part of it; only a row without any text is known by all it has.
    """
    key = row.get("key")
    if key is not None:
        return key if isinstance(key, str) else canonical_json(key)
    row = canonical(row)
    if asked := asked_of(row):
        return asked
    texts = {column: _plain(row[column]) for column in TEXT_COLUMNS if row.get(column) is not None}
    return canonical_json(texts or row)


def asked_of(row: Mapping[str, Any]) -> str:
    """Of a canonical row, the turns up to the first answer, without the system turn, as normalised text, or "".

    The same for `question`, for `prompt` as a string or as turns, for `messages`, and for whole conversations in `chosen`.
    """
    for column in ASKING_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and (asked := _asked_in(value)):
            return asked
    return ""


def normalised(text: str) -> str:
    """Text in Unicode's composed form (NFC), with single spaces for runs of white space and none at the ends."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def split_place(key: str) -> float:
    """A number that is uniform in [0, 1) over keys: the first 53 bits of sha256. It stands for the key too.

    1 for ALWAYS_TRAINED, which is below no holdout.
    """
    if key == ALWAYS_TRAINED:
        return 1.0
    return (int.from_bytes(hashlib.sha256(key.encode(errors="replace")).digest()[:8], "big") >> 11) / (1 << 53)


def canonical_json(value: Any) -> str:
    """One text for equal JSON values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def _asked_in(turns: list[Any] | tuple[Any, ...]) -> str:
    said = []
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, turn)
        if role == "assistant":
            break
        if role != "system" and content is not None:
            said.append(content if isinstance(content, str) else canonical_json(content))
    return normalised(" ".join(said))


def _plain(value: Any) -> Any:
    """A text column's texts, normalised, without what else its turns carry."""
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, list | tuple):
        return [
            [turn.get("role"), _plain(turn.get("content"))] if isinstance(turn, Mapping) else turn for turn in value
        ]
    return value
