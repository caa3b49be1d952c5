"""Text of a completion as its tokens arrive: whole characters only, up to the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lm.data.text_tokenizer import TextTokenizer

HALF = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an incomplete character decode to
LONGEST_HALF = 8  # tokens; more that decode to no character are no character


class ScoredToken(NamedTuple):
    """A sampled token with its log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    logp: float
    others: tuple[tuple[int, float], ...] = ()


class TextPiece(NamedTuple):
    """The next part of a completion's text, and the tokens that it comes from."""

    text: str
    tokens: list[ScoredToken]


class TextStream:
    """The text of one completion; `stopped` is true once it has reached one of the stop strings.

    Args:
        before: tokens before the completion, which its text continues without a break.
        reported: whether the tokens are reported too, each with its part of the text.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stop: Sequence[str] = (), before: Sequence[int] = (), reported: bool = False
    ):
        self._reported = reported
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(before)
        # The tokens from `_context` on are decoded again; the text of those from `_read` on is new.
        self._context, self._read = 0, len(self._ids)
        self._held = ""  # text that may be the beginning of a stop string
        self._waiting: list[
            tuple[int, ScoredToken]
        ] = []  # tokens whose text has not been released, each with its start in `_held`
        self.stopped = False

    def add(self, tokens: Sequence[ScoredToken]) -> TextPiece:
        """The text that these tokens complete; if tokens are reported, those whose text it has."""
        if not self._reported:
            return TextPiece(self._released([one.token for one in tokens])[0], [])
        text, given = "", []
        for one in tokens:
            if self.stopped:
                break
            self._waiting.append((len(self._held), one))
            piece, size = self._released([one.token])
            text += piece
            given += [token for start, token in self._waiting if start < size]
            self._waiting = [(start - size, token) for start, token in self._waiting if start >= size]
        return TextPiece(text, given)

    def end(self) -> TextPiece:
        """What is held after the last token; the beginning of a character is left out."""
        return TextPiece("", []) if self.stopped else TextPiece(self._held, [token for _, token in self._waiting])

    def _released(self, tokens: list[int]) -> tuple[str, int]:
        """The text that is free after further tokens, and its size."""
        self._held += self._decoded(tokens)
        size = self._free()
        text, self._held = self._held[:size], self._held[size:]
        return text, size

    def _free(self) -> int:
        """Number of characters of the held text that come before any stop string, whatever follows."""
        found = [at for one in self._stop if (at := self._held.find(one)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        most = max(map(len, self._stop), default=1) - 1
        starts = range(max(0, len(self._held) - most), len(self._held))
        return next(
            (at for at in starts if any(one.startswith(self._held[at:]) for one in self._stop)), len(self._held)
        )

    def _decoded(self, tokens: list[int]) -> str:
        """The characters that these tokens complete."""
        self._ids += tokens
        before = self._text(self._context, self._read)
        # The last tokens may be the beginning of a character.
        for stop in range(len(self._ids), max(self._read, len(self._ids) - LONGEST_HALF), -1):
            text = self._text(self._context, stop)
            if not text.endswith(HALF):
                self._context, self._read = self._read, stop
                return text[len(before) :]
        if len(self._ids) - self._read <= LONGEST_HALF:
            return ""
        # Not a character: all of it is released but the last bytes, which may begin one.
        text = self._text(self._context, None)
        own = next((size for size in (3, 2, 1) if self._text(len(self._ids) - size, None) == HALF), 0)
        self._context = self._read = len(self._ids) - own
        return text[len(before) : len(text) - bool(own)]

    def _text(self, start: int, stop: int | None) -> str:
        return self._tokenizer.decode(self._ids[start:stop])
