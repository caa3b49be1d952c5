"""Converts the tokenizer in a GGUF file to the files of a published model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from lm.config.field import shown
from lm.data.hub import files as hub_files
from lm.experiment import UserError
from lm.interop.gguf_file import read_metadata

KEY = "tokenizer.ggml."
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
"""Values of tokenizer.ggml.token_type, which are sentencepiece's numbers from 1 to 6."""
NORMALIZER = {"add_space_prefix": True, "remove_extra_whitespaces": False}
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": f"{CONTRACTIONS}|{WORDS}|{digits}|{REST}"}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _byte_level(False)]


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
"""tokenizer.ggml.pre -> steps of the pre-tokenizer in tokenizer.json."""


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a GGUF file, by name.

    Raises:
        UserError: the file cannot be read, has no tokenizer, or one of an unsupported kind.
    """
    return files_of(read_metadata(path), path)


def files_of(found: dict[str, Any], path: Path) -> dict[str, bytes]:
    """The files of the tokenizer that a GGUF file's metadata describes; see `tokenizer_files`."""
    kind = found.get(f"{KEY}model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: {KEY}model is {shown(kind)}; it should be gpt2 or llama")
    tokens = _listed(path, found, "tokens", str)
    types = _listed(path, found, "token_type", int, len(tokens))
    named = {role: found.get(f"{KEY}{name}_token_id") for role, name in ROLES.items()}
    ends = [found[f"{KEY}{name}_token_id"] for name in ENDS if f"{KEY}{name}_token_id" in found]
    given = [index for index in (*named.values(), *ends) if index is not None]
    if outside := [index for index in given if type(index) is not int or not 0 <= index < len(tokens)]:
        raise UserError(f"{path}: {shown(outside[0])} is not the id of a token; there are {len(tokens)} tokens")
    added = [
        {"id": index, "content": token, "special": types[index] == CONTROL, "normalized": False}
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, USER_DEFINED)
    ]
    config = {role: tokens[index] for role, index in named.items() if index is not None}
    config["chat_template"] = found.get("tokenizer.chat_template")
    config["add_bos_token"] = bool(found.get(f"{KEY}add_bos_token", kind == "llama"))
    config["tokenizer_class"] = {"llama": "LlamaTokenizer", "gpt2": "PreTrainedTokenizerFast"}[kind]
    if kind == "llama":
        config["added_tokens_decoder"] = {str(one.pop("id")): one for one in added}
        vocabulary = {hub_files.SENTENCEPIECE: _sentencepiece(path, found, tokens, types)}
    else:
        vocabulary = {hub_files.TOKENIZER_JSON: json.dumps(_byte_pairs(path, found, tokens, added)).encode()}
    beside = {hub_files.CONFIG: config, hub_files.GENERATION: {"eos_token_id": ends}}
    return vocabulary | {name: json.dumps(content).encode() for name, content in beside.items()}


def _byte_pairs(path: Path, found: dict[str, Any], tokens: list[str], added: list[dict[str, Any]]) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE."""
    name = found.get(f"{KEY}pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UserError(f"{path}: {KEY}pre is {shown(name)}; there are {', '.join(PRE_TOKENIZERS)}")
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name]},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "ignore_merges": name == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _listed(path, found, "merges", str),
        },
    }


def _sentencepiece(path: Path, found: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """The tokenizer.model of a sentencepiece BPE."""
    scores = _listed(path, found, "scores", float, len(tokens))
    flags = {name: bool(found.get(f"{KEY}{name}", default)) for name, default in NORMALIZER.items()}
    proto = sentencepiece_model.ModelProto()  # type: ignore[attr-defined]
    for token, score, number in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=number)
    proto.trainer_spec.model_type = sentencepiece_model.TrainerSpec.BPE  # type: ignore[attr-defined]
    proto.trainer_spec.byte_fallback = BYTE in types
    proto.trainer_spec.vocab_size = len(tokens)
    for role in ("bos", "eos", "unk"):
        index = found.get(f"{KEY}{ROLES[f'{role}_token']}_token_id")
        setattr(proto.trainer_spec, f"{role}_id", -1 if index is None else index)
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = flags["add_space_prefix"]
    proto.normalizer_spec.remove_extra_whitespaces = flags["remove_extra_whitespaces"]
    return proto.SerializeToString()


def _listed(path: Path, found: dict[str, Any], name: str, kind: type, count: int | None = None) -> list[Any]:
    """An array of the metadata. Raises UserError if it is missing, or its values have another type or number."""
    values = found.get(f"{KEY}{name}")
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise UserError(f"{path}: {KEY}{name} is {shown(values)}; it should be an array of {kind.__name__}")
    if count not in (None, len(values)):
        raise UserError(f"{path}: {KEY}{name} has {len(values)} values; it should have {count}, one for each token")
    if name == "token_type" and (strange := [value for value in values if not 1 <= value <= BYTE]):
        raise UserError(f"{path}: {KEY}{name} has {strange[0]}; it should be a number from 1 to {BYTE}")
    return values
