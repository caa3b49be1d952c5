"""Responses of the OpenAI protocol: whole ones, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm.serve.completions import Delta, LiveCompletion
from lm.serve.protocol import Asked, Refused, finite
from lm.serve.schema import Tokens
from lm.serve.text_stream import ScoredToken

DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


class Replies:
    """Makes the responses to one request. Offsets of texts are counted by choice, as the chunks come."""

    def __init__(self, asked: Asked, model: str, tokens: Tokens, completions: Sequence[LiveCompletion]):
        self._asked, self._tokens, self._completions = asked, tokens, completions
        kind = "chat.completion" if asked.chat else "text_completion"
        chunk = ".chunk" if asked.chat and asked.stream else ""
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind + chunk, "created": int(time.time()),
            "model": model,
        }  # fmt: skip
        self._offsets = [0] * len(completions)

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The response from all deltas of a request.

        Raises:
            Refused: a completion has failed.
        """
        choices = []
        for index in range(len(self._completions)):
            own = [one for one in deltas if one.index == index]
            if error := next((one.error for one in own if one.error), None):
                raise error
            tokens = [token for one in own for token in one.tokens]
            choices.append(self._choice(Delta(index, "".join(one.text for one in own), tokens, own[-1].finish), False))
        return {**self._head, "choices": choices, "usage": self.usage()}

    def first(self) -> bytes:
        """The events before any text: of a chat, the roles."""
        if not self._asked.chat:
            return b""
        message = {"role": "assistant", "content": ""}
        choices = [
            {"index": index, "delta": message, "logprobs": None, "finish_reason": None}
            for index in range(len(self._completions))
        ]
        return b"".join(event({**self._head, "choices": [one]}) for one in choices)

    def chunk(self, delta: Delta) -> bytes:
        """The event of a delta; of an error, the last one."""
        if delta.error is not None:
            return event(delta.error.body())
        return event({**self._head, "choices": [self._choice(delta, True)]})

    def last(self) -> bytes:
        """The events after the last delta."""
        if not self._asked.usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self.usage()}) + DONE

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; a prompt counts once for all of its completions."""
        prompts = sum(len(one.prompt) for one in self._completions if one.sample == 0)
        sampled = sum(one.sampled for one in self._completions)
        return {"prompt_tokens": prompts, "completion_tokens": sampled, "total_tokens": prompts + sampled}

    def _choice(self, delta: Delta, streamed: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": delta.index, "finish_reason": delta.finish}
        if not self._asked.chat:
            choice["text"] = delta.text
        elif streamed:
            choice["delta"] = {"content": delta.text} if delta.text or not delta.finish else {}
        else:
            choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
        scores = None
        if self._asked.settings.alternatives is not None:
            scores = self._chat_scores(delta.tokens) if self._asked.chat else self._text_scores(delta)
        choice["logprobs"] = scores
        return choice

    def _chat_scores(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            {
                **self._entry(one.token, one.logp),
                "top_logprobs": [self._entry(token, logp) for token, logp in one.others],
            }
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logp: float) -> dict[str, Any]:
        raw = self._tokens.bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logp), "bytes": list(raw)}

    def _text_scores(self, delta: Delta) -> dict[str, Any]:
        names = [self._name(one.token) for one in delta.tokens]
        offsets = []
        for name in names:
            offsets.append(self._offsets[delta.index])
            self._offsets[delta.index] += len(name)
        others = [{self._name(token): finite(logp) for token, logp in one.others} for one in delta.tokens]
        return {
            "tokens": names,
            "token_logprobs": [finite(one.logp) for one in delta.tokens],
            "top_logprobs": others if self._asked.settings.alternatives else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return self._tokens.bytes_of(token).decode(errors="replace")


def model_list(names: Mapping[str, int]) -> dict[str, Any]:
    """The response of /v1/models, from the names of models and the times of their creation."""
    return {"object": "list", "data": [model_object(name, created) for name, created in names.items()]}


def model_object(name: str, created: int) -> dict[str, Any]:
    """A model as the protocol shows it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lm"}


def no_route(path: str) -> Refused:
    """The error of a path that does not exist."""
    return Refused(f"there is no {path[:100]}", status=404, code="not_found")
