"""The train/held-out split: a row's key is its prompt, and a hash of the key determines the side.

Rows with the same key are on the same side in any file, order, process and layout, whatever their other columns contain.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from lm.data.bad_rows import is_blank
from lm.data.layouts import canonical

TEXT_COLUMNS = ("text", "messages", "prompt", "chosen", "rejected", "completion")  # of canonical rows
ASKING_COLUMNS = (
    "prompt",
    "messages",
    "chosen",
)  # columns with a prompt; of a conversation in `chosen`, the turns up to the first answer

ALWAYS_TRAINED = "never held out"  # key of rows that no split holds out

Places = Float64[np.ndarray, " N"]


def has_key(row: Mapping[str, Any]) -> bool:
    """Whether a row has a `key` that is not null, NaN or blank, as tables write a missing one."""
    key = row.get("key")
    return not is_blank(key) and key == key


def split_key(row: Mapping[str, Any]) -> str:
    """The split key of a row: its `key` (`has_key`), else its prompt, else its texts.

    Other columns (an id, a source, a date) are not part of it; a row without any text is keyed by all its columns.
    """
    if has_key(row):
        key = row["key"]
        return key if isinstance(key, str) else canonical_json(key)
    row = canonical(row)
    if asked := asked_of(row):
        return asked
    texts = {column: _plain(row[column]) for column in TEXT_COLUMNS if row.get(column) is not None}
    return canonical_json(texts or row)


def asked_of(row: Mapping[str, Any]) -> str:
    """The prompt of a canonical row as normalised text: turns up to the first answer, without the system turn; or "".

    The same for `question`, for `prompt` as a string or as turns, for `messages`, and for whole conversations in `chosen`.
    """
    for column in ASKING_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and (asked := _asked_in(value)):
            return asked
    return ""


def normalised(text: str) -> str:
    """Normalise text: Unicode NFC, runs of white space as single spaces, none at the ends."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def split_place(key: str) -> float:
    """Hash a key to a number uniform in [0, 1): the first 53 bits of SHA-256. It also identifies the key.

    1 for ALWAYS_TRAINED, which no holdout reaches.
    """
    if key == ALWAYS_TRAINED:
        return 1.0
    return (int.from_bytes(hashlib.sha256(key.encode(errors="replace")).digest()[:8], "big") >> 11) / (1 << 53)


def canonical_json(value: Any) -> str:
    """Canonical JSON text: equal for equal values."""
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
    """The normalised texts of a text column, without other keys of its turns."""
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, list | tuple):
        return [
            [turn.get("role"), _plain(turn.get("content"))] if isinstance(turn, Mapping) else turn for turn in value
        ]
    return value
