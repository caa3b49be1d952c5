"""JSON schemas as masks of the tokens that may come next, by llguidance; and the bytes of each token."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import llguidance
import numpy as np
import sentencepiece
from jaxtyping import Int32

from lm.data.hub import files as hub_files
from lm.data.text_tokenizer import TextTokenizer
from lm.serve.protocol import Refused

LARGEST_SCHEMA = 20_000  # characters
COMPACT: Any = {"whitespace_flexible": False}
"""One form of white space: a model cannot fill its answer with it."""


class Matcher:
    """The state of one completion in its schema."""

    def __init__(self, tokens: Tokens, grammar: str):
        self._matcher = llguidance.LLMatcher(tokens.library, grammar, log_level=0)

    def consume_tokens(self, tokens: list[int]) -> None:
        """Go on by sampled tokens."""
        self._matcher.consume_tokens(tokens)

    def is_stopped(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped()

    def error(self) -> str:
        """Why the schema could not be followed further, such as a limit of its complexity; empty if it was."""
        return self._matcher.get_error().split("\n")[0] if self._matcher.is_error() else ""

    def fill(self, row: Int32[np.ndarray, " W"]) -> None:
        """Write the bits of the tokens that may come next into a row of `SlotSettings.allowed`."""
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        size = min(len(row), len(found))
        row[:], row[:size] = 0, found[:size]


class Tokens:
    """The tokens of a tokenizer as bytes, for schemas and log-probabilities."""

    def __init__(self, tokenizer: TextTokenizer):
        self.library = _library(tokenizer)
        self._specials = {index: name.encode() for name, index in tokenizer.special_ids.items()}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; of a special token, its name."""
        return self._specials.get(token) or self.library.decode_bytes([token])

    def grammar(self, schema: Mapping[str, Any]) -> str:
        """The grammar of a JSON schema.

        Raises:
            Refused: it is no schema, or one that llguidance does not know.
        """
        try:
            text = json.dumps(schema)
            if len(text) > LARGEST_SCHEMA:
                raise _refused(f"the schema has {len(text)} characters; it should have at most {LARGEST_SCHEMA}")
            return _grammar(self, text)
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from error

    def matcher(self, grammar: str) -> Matcher:
        """A matcher at the beginning of a completion."""
        return Matcher(self, grammar)


@functools.lru_cache(maxsize=64)
def _grammar(tokens: Tokens, schema: str) -> str:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)
    told = llguidance.LLMatcher.validate_grammar(grammar, tokens.library)
    if told and not told.startswith("WARNING"):
        raise _refused(told)
    if Matcher(tokens, grammar).is_stopped():
        raise _refused("no JSON value satisfies the schema")
    return grammar


def _refused(why: str) -> Refused:
    return Refused(f"response_format: {' '.join(why.split())[:300]}", "response_format", code="invalid_schema")


def _library(tokenizer: TextTokenizer) -> llguidance.LLTokenizer:
    files = tokenizer.published_files(max_len=0)
    ends = list(tokenizer.end_ids)
    if hub_files.TOKENIZER_JSON in files:
        text = files[hub_files.TOKENIZER_JSON].decode()
        return llguidance.LLTokenizer(text, n_vocab=tokenizer.vocab_size, eos_token=ends)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Pieces(files, tokenizer)), eos_token=ends)


class _Pieces:
    """A sentencepiece model with the added tokens beside it, as llguidance reads one."""

    def __init__(self, files: Mapping[str, bytes], tokenizer: TextTokenizer):
        pieces = sentencepiece.SentencePieceProcessor(model_proto=files[hub_files.SENTENCEPIECE])
        added = {index: name.encode() for name, index in tokenizer.special_ids.items()}
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.document_ids[0]
        self.tokens = [
            added.get(index) or (_bytes(pieces, index) if index < pieces.vocab_size() else b"")
            for index in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = sorted(added)
        self._ids = {piece: index for index, piece in enumerate(self.tokens) if piece and index not in added}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Ids of the longest pieces; the model itself would begin every text with a space."""
        found, at = [], 0
        while at < len(text):
            size = next(n for n in range(self._longest, 0, -1) if text[at : at + n] in self._ids or n == 1)
            found.append(self._ids.get(text[at : at + size], 0))
            at += size
        return found


def _bytes(pieces: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    piece = pieces.id_to_piece(index)
    return bytes([int(piece[3:-1], 16)]) if pieces.is_byte(index) else piece.replace("\u2581", " ").encode()
