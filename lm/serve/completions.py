"""A completion of the server while it waits, is sampled, and ends; what it yields goes to a sink, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.serve.protocol import Refused, Settings
from lm.serve.text_stream import ScoredToken, TextStream


@dataclass(frozen=True)
class Delta:
    """What a step added to a completion. `finish` is the protocol's finish_reason once it has ended."""

    index: int
    text: str
    tokens: Sequence[ScoredToken]
    finish: str | None = None
    error: Refused | None = None


@dataclass(eq=False)
class LiveCompletion:
    """One completion: its request, and its state. `cancelled` is set by the connection, the rest by the engine's thread.

    Attributes:
        index: its number among all choices of the request.
        sample: its number among those of its prompt; with the seed it determines the random numbers.
        limit: maximum number of tokens.
        matcher: of a JSON schema; None without one.
        arrived: steps of the engine when the request came.
        first: steps from then to the first token, that one included; None before it.
    """

    index: int
    sample: int
    prompt: Sequence[int]
    settings: Settings
    limit: int
    deadline: float
    sink: Callable[[Delta], None]
    text: TextStream
    matcher: Any = None
    arrived: int = 0
    first: int | None = None
    sampled: int = 0
    cancelled: bool = False
    finished: bool = False
    _kept: list[ScoredToken] = field(default_factory=list)  # tokens that have not been passed on
    _next: float = 0.0  # when the next ones are

    def add(self, tokens: Sequence[ScoredToken], done: bool, end_ids: Sequence[int], now: float, pause: float) -> None:
        """Take the tokens of a step, `done` if the slot has ended with them; pass them on, but only every `pause` seconds.

        The first and the last are passed on at once.
        """
        if self.finished:
            return
        self.sampled += len(tokens)
        self._kept += tokens
        if not done and now < self._next:
            return
        tokens, self._kept, self._next = self._kept, [], now + pause
        ended = done and bool(tokens) and tokens[-1].token in end_ids
        piece = self.text.add(tokens[: len(tokens) - ended])
        if self.matcher is not None and (why := self.matcher.error()):
            return self.fail(Refused(f"response_format: {why}", "response_format", code="schema_not_followed"))
        satisfied = self.matcher is not None and self.matcher.is_stopped()
        finish = "stop" if ended or self.text.stopped or satisfied else "length" if done else None
        if finish and not self.text.stopped:
            rest = self.text.end()
            piece = piece._replace(text=piece.text + rest.text, tokens=[*piece.tokens, *rest.tokens])
        self.finished = finish is not None
        if piece.text or piece.tokens or finish:
            self.sink(Delta(self.index, piece.text, piece.tokens, finish))

    def fail(self, error: Refused) -> None:
        """End it with an error."""
        if not self.finished:
            self.finished = True
            self.sink(Delta(self.index, "", (), None, error))
