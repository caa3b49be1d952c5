"""The files of a published tokenizer, and the special tokens, end tokens and chat templates that they define."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lm.experiment import UserError

VOCABULARIES = TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TEMPLATE = "chat_template.jinja"
CONFIG, SPECIAL_MAP, GENERATION, ADDED, OPTIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json", "options.json",
)  # fmt: skip
READ = (TOKENIZER_JSON, SENTENCEPIECE, TEMPLATE, CONFIG, SPECIAL_MAP, GENERATION, ADDED, OPTIONS)
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LARGEST = 256 * 2**20  # maximum bytes of a file
# Spellings of control tokens that some families do not mark as special.
CONTROL_SPELLING = re.compile(r"<[|｜].*[|｜]>|</?s>|<(unk|pad|bos|eos|mask|cls|sep)>", re.DOTALL)


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the rest is tokenized."""

    name: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False

    @property
    def is_control(self) -> bool:
        """Whether it is a control token, which no message's text may become, not even the assistant's."""
        return self.special or CONTROL_SPELLING.fullmatch(self.name) is not None


def read_files(folder: Path, where: str) -> dict[str, bytes]:
    """The tokenizer's files in a folder, by name. Raises UserError if there is no tokenizer."""
    found: dict[str, bytes] = {}
    for name in READ:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > LARGEST:
                raise UserError(f"{where}: {path} has more than {LARGEST:,} bytes, too many for a tokenizer's file")
            found[name] = path.read_bytes()
    if not {TOKENIZER_JSON, SENTENCEPIECE} & found.keys():
        raise UserError(f"{where}: {folder} has neither {TOKENIZER_JSON} nor {SENTENCEPIECE}; name a model's folder")
    for name in (TOKENIZER_JSON, SENTENCEPIECE):
        if name in found and not found[name].strip():
            raise UserError(f"{where}: {folder / name} is empty; fetch it again")
        if found.get(name, b"").startswith(b"version https://git-lfs"):
            raise UserError(
                f"{where}: {folder / name} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it"
            )
    return found


def read_json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file. Raises UserError if its content is not a JSON object."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name} is not valid JSON: {error!s:.120}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} must hold a JSON object, found {value!r:.60}")
    return value


def read_date(options: Mapping[str, Any], where: str) -> datetime | None:
    """The date passed to chat templates, from `options.json`; None: today. Raises UserError if it is not a date."""
    if "today" not in options:
        return None
    try:
        return datetime.fromisoformat(options["today"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: today in {OPTIONS} must be a date, found {options['today']!r:.60}") from error


def special_token_names(files: Mapping[str, bytes], where: str) -> dict[str, str]:
    """The names of the special tokens by role (`bos_token` and so on), as templates see them."""
    merged = read_json(files, SPECIAL_MAP, where) | {
        name: value for name, value in read_json(files, CONFIG, where).items() if value is not None
    }
    found = {role: _content(merged[role]) for role in TOKEN_NAMES if merged.get(role) is not None}
    return {role: name for role, name in found.items() if isinstance(name, str)}


def end_ids(files: Mapping[str, bytes], where: str) -> tuple[int, ...]:
    """The ids that end a text, from `generation_config.json`."""
    value = read_json(files, GENERATION, where).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise UserError(f"{where}: eos_token_id in {GENERATION} must be an id or a list of ids, found {value!r:.60}")
    return tuple(ids)


def added_beside(files: Mapping[str, bytes], where: str) -> list[Any]:
    """The added tokens listed by the files beside a sentencepiece model, in the layout of `tokenizer.json`."""
    decoder = read_json(files, CONFIG, where).get("added_tokens_decoder") or {}
    listed = [{"content": name, "id": index} for name, index in read_json(files, ADDED, where).items()]
    try:
        return listed + [token | {"id": int(index)} for index, token in decoder.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: added_tokens_decoder in {CONFIG} must map ids to tokens: {error!s:.80}") from error


def added_tokens(listed: Any, where: str) -> dict[str, AddedToken]:
    """The added tokens by name. Raises UserError if the list cannot be read."""
    if not isinstance(listed, list):
        raise UserError(f"{where}: the added tokens must be a list, found {listed!r:.60}")
    tokens = [_added_token(item, where) for item in listed]
    return {token.name: token for token in tokens if token.name}


def _added_token(item: Any, where: str) -> AddedToken:
    item = item if isinstance(item, dict) else {"content": item}
    name, index = item.get("content"), item.get("id")
    if not isinstance(name, str) or type(index) is not int or not 0 <= index < LARGEST:
        raise UserError(f"{where}: an added token must have an id and a text `content`, found {item!r:.80}")
    return AddedToken(name, index, *(bool(item.get(key)) for key in ("special", "lstrip", "rstrip")))


def template_sources(files: Mapping[str, bytes], where: str) -> dict[str, str]:
    """The chat templates by name; `default` is used unless another is requested."""
    if TEMPLATE in files:
        return {"default": files[TEMPLATE].decode(errors="replace")}
    found = read_json(files, CONFIG, where).get("chat_template")
    if isinstance(found, list):
        return {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, dict)}
    return {"default": found} if isinstance(found, str) else {}


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
