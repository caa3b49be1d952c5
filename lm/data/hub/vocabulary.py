"""Text to ids and back by `tokenizer.json` or a sentencepiece model, with control tokens kept apart from text."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from lm.data.hub.files import TOKENIZER_JSON, AddedToken
from lm.experiment import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data's worker processes are the parallel part
import tokenizers

OPEN, CLOSE = "\U0010fffe", "\U0010ffff"  # noncharacters around a control token's name
SPACE = "\u2581"

Segment = str | AddedToken
"""Text, or a control token that is not from a text."""


class Encoded(NamedTuple):
    """Ids, and the characters [start, end) of each."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Vocabulary(Protocol):
    """Protocol of a vocabulary, implemented for `tokenizer.json` and for sentencepiece models."""

    vocab_size: int

    def encode(self, segments: Sequence[Segment], add_special: bool = False) -> Encoded:
        """Ids and offsets of texts and control tokens in sequence; a control token counts as the characters of its name."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts without control tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens spelt out."""
        ...


class JsonVocabulary:
    """A `tokenizer.json`, read by the tokenizers library.

    The control tokens in `apart` are renamed to names that nobody can type. A text that contains a token's name therefore
    stays text, while the library matches the tokens that a caller puts between texts, including the white space
    that they strip and the prefix that depends on them.
    """

    def __init__(self, parsed: dict[str, Any], raw: bytes, apart: Mapping[str, AddedToken], where: str):
        self._where = where
        secret = secrets.token_hex(8)
        self._typed = re.compile(f"{OPEN}(.*?){secret}{CLOSE}", re.DOTALL)
        self._names = {name: f"{OPEN}{name}{secret}{CLOSE}" for name in apart}
        # Offsets must include a token's white space to show whether it belongs to an answer; this changes no ids.
        exact = parsed | {"post_processor": _untrimmed(parsed.get("post_processor"))}
        try:
            _check_prefix(parsed.get("model"))
            as_it_is = not apart and exact == parsed
            source = raw.decode() if as_it_is else json.dumps(_renamed(exact, self._names), ensure_ascii=False)
            self._library = tokenizers.Tokenizer.from_str(source)
            self._library.no_truncation()
            self._library.no_padding()
            # Ids may have gaps, and the post-processor has ids of its own.
            ids = [*self._library.get_vocab().values(), *self._library.encode("").ids]
            ids += [one["id"] for one in parsed.get("added_tokens") or ()]
            self.vocab_size = max(self._library.get_vocab_size(), 1 + max(ids, default=-1))
        except BaseException as error:
            self._refuse(error, "is not a tokenizer that can be read")

    def _refuse(self, error: BaseException, what: str) -> NoReturn:
        """Raise UserError for an error of the library, which raises Exception itself, or a panic, which is none; others go on."""
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        raise UserError(f"{self._where}: {TOKENIZER_JSON} {what}: {' '.join(str(error).split()):.160}") from error

    def encode(self, segments: Sequence[Segment], add_special: bool = False) -> Encoded:
        """See `Vocabulary`."""
        names = [one if isinstance(one, str) else one.name for one in segments]
        given = [one if isinstance(one, str) else self._names.get(one.name, one.name) for one in segments]
        try:
            found = self._library.encode("".join(given), add_special_tokens=add_special)
        except BaseException as error:
            self._refuse(error, f"cannot encode {''.join(names)!r:.60}")
        places = np.array(found.offsets, np.int64).reshape(-1, 2)
        if names != given:
            at, seen = (np.cumsum([0, *map(len, some)]) for some in (given, names))
            number = np.minimum(np.searchsorted(at, places, "right"), len(names)) - 1
            places = np.minimum(seen[number] + places - at[number], seen[number + 1])
        return Encoded(found.ids, *places.T.tolist())

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Vocabulary`."""
        try:
            return [one.ids for one in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            self._refuse(error, f"cannot encode one of {len(texts)} texts")

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        try:
            text = self._library.decode(ids, skip_special_tokens=False)
        except BaseException as error:
            self._refuse(error, f"cannot decode {len(ids)} tokens")
        return self._typed.sub(r"\1", text)


def _check_prefix(model: Any) -> None:
    """Raise ValueError if a merge lacks the prefix of continuing pieces, because the library would panic."""
    prefix: Any = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    for pair in (model.get("merges") or ()) if prefix else ():
        second = pair.split(" ", 1)[-1] if isinstance(pair, str) else pair[-1]
        if not second.startswith(prefix):
            raise ValueError(f"the merge {pair!r:.60} does not have the continuing_subword_prefix {prefix!r:.60}")


def _renamed(parsed: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A `tokenizer.json` with tokens renamed everywhere."""
    model = dict(parsed["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if not names.keys().isdisjoint(piece for piece in parsed["model"].get("vocab") or () if isinstance(piece, str)):
        model["merges"] = [pair for pair in model.get("merges") or () if not _makes(pair, names)]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [
        token | {"content": names.get(token["content"], token["content"])} for token in parsed.get("added_tokens") or ()
    ]
    after = _texts_renamed(parsed.get("post_processor"), names)
    return parsed | {"model": model, "added_tokens": added, "post_processor": after}


def _makes(pair: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge of two pieces, or a part of it, is one of the tokens."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    return "".join(parts) in names or not names.keys().isdisjoint(parts)


def _untrimmed(value: Any) -> Any:
    """A post-processor whose token offsets include white space."""
    if isinstance(value, dict):
        return {key: False if key == "trim_offsets" else _untrimmed(item) for key, item in value.items()}
    return [_untrimmed(item) for item in value] if isinstance(value, list) else value


def _texts_renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A nested value in which every text or key that is one of the names is renamed."""
    if isinstance(value, dict):
        return {names.get(key, key): _texts_renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


class SentencepieceVocabulary:
    """A sentencepiece model and the added tokens of the files beside it.

    `prefix_once`: only a text at the very beginning gets the model's prefix (`legacy` false in its settings).
    """

    def __init__(self, model: bytes, added: Mapping[str, AddedToken], prefix_once: bool, where: str):
        self._model, self._bare = _loaded(model, where), _loaded(_without_prefix(model), where)
        self._beyond = {one.id: name for name, one in added.items() if one.id >= self._model.vocab_size()}
        self._prefix_once = prefix_once
        self.vocab_size = max([self._model.vocab_size() - 1, *self._beyond]) + 1

    def encode(self, segments: Sequence[Segment], add_special: bool = False) -> Encoded:
        """See `Vocabulary`."""
        ids, starts, ends = [], [], []
        if add_special and self._model.bos_id() >= 0:
            ids, starts, ends = [self._model.bos_id()], [0], [0]
        at, swallow = 0, False
        for number, one in enumerate(segments):
            if not isinstance(one, str):
                ids.append(one.id)
                starts.append(at)
                at += len(one.name)
                ends.append(at)
                swallow = one.rstrip
                continue
            left = len(one) - len(one.lstrip()) if swallow else 0
            if left:
                ends[-1] += left
            following = segments[number + 1] if number + 1 < len(segments) else None
            text = one[left:].rstrip() if isinstance(following, AddedToken) and following.lstrip else one[left:]
            reader = self._bare if self._prefix_once and number else self._model
            begins, stops = _places(text)
            for piece in reader.encode(text, return_type="proto").pieces if text else ():
                ids.append(piece.id)
                starts.append(at + left + begins[piece.begin])
                # The library gives no extent for a byte of a character, or for the prefix; the whole character is used.
                ends.append(at + left + stops[max(piece.end, min(piece.begin + 1, len(stops) - 1))])
            at += len(one)
        return Encoded(ids, starts, ends)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Vocabulary`."""
        return self._model.encode(list(texts), num_threads=2)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        parts: list[str] = []
        run: list[int] = []
        for index in [*ids, None]:
            if index is not None and index not in self._beyond and not self._model.is_control(index):
                run.append(index)
                continue
            if run:
                text = self._model.decode(run)
                first = self._model.id_to_piece(run[0])
                parts.append(f" {text}" if parts and first.startswith(SPACE) and not text.startswith(" ") else text)
                run = []
            if index is not None:
                parts.append(self._beyond.get(index) or self._model.id_to_piece(index))
        return "".join(parts)


def _loaded(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{where}: tokenizer.model is not a sentencepiece model") from error


def control_pieces(model: bytes, where: str) -> dict[str, AddedToken]:
    """The control pieces of a sentencepiece model, by name."""
    loaded = _loaded(model, where)
    control = filter(loaded.is_control, range(loaded.vocab_size()))
    try:
        named = {index: loaded.id_to_piece(index) for index in [*control, loaded.unk_id()]}
    except (IndexError, ValueError) as error:  # an id beyond the pieces, a name that is not UTF-8
        raise UserError(f"{where}: tokenizer.model has control pieces that cannot be read: {error}") from error
    return {name: AddedToken(name, index, special=True) for index, name in named.items()}


def _places(text: str) -> tuple[list[int], list[int]]:
    """By byte offset: the index of the character in which a piece beginning there starts, and the index after the one in which a
    piece ending there stops."""
    of_byte = [number for number, letter in enumerate(text) for _ in letter.encode()]
    return [*of_byte, len(text)], [0, *(number + 1 for number in of_byte)]


def _without_prefix(model: bytes) -> bytes:
    proto = sentencepiece_model.ModelProto.FromString(model)  # type: ignore[attr-defined]
    proto.normalizer_spec.add_dummy_prefix = False
    return proto.SerializeToString()


def split_at(text: str, names: Iterable[str]) -> list[tuple[str, bool]]:
    """The text split at the names, leftmost and longest first; each piece comes with whether it is a name."""
    pattern = _either(frozenset(names))
    pieces = [text] if pattern is None else pattern.split(text)
    return [(piece, number % 2 == 1) for number, piece in enumerate(pieces) if piece]


@functools.lru_cache(maxsize=256)
def _either(names: frozenset[str]) -> re.Pattern[str] | None:
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None
