"""Requests of the OpenAI protocol: untrusted JSON to values, and errors in the protocol's shape."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm.config.field import nearest, shown
from lm.rollout.stepping import ALTERNATIVES

MOST_STOPS, LONGEST_STOP, LONGEST_NAME = 16, 1000, 60
GREEDY_BELOW = 0.01  # temperatures below are greedy
WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
"""Fields that a request may have, and that change nothing here."""
UNSUPPORTED = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": "", "echo": False,
    "tools": [], "functions": [], "tool_choice": "none", "function_call": "none", "modalities": ["text"], "audio": None,
    "prediction": None, "reasoning_effort": "none", "verbosity": "medium", "web_search_options": None,
}  # fmt: skip
"""Fields of the protocol that are refused, unless they have the value that asks for nothing."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


class Refused(Exception):
    """A request that cannot be answered: HTTP status, message, field, and the protocol's code and type."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, kind: str = ""
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        param = None if self.param is None else _text(self.param)
        return {"error": {"message": _text(str(self)), "type": self.kind, "param": param, "code": self.code}}


@dataclass(frozen=True)
class Settings:
    """How completions are sampled. `alternatives` is None without log-probabilities; `schema` is None without a JSON schema."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int | None
    stop: tuple[str, ...]
    alternatives: int | None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Asked:
    """A request: prompts, each a conversation, a text or token ids, with `n` completions each."""

    model: str
    prompts: Sequence[Any]
    chat: bool
    n: int
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens
    settings: Settings
    variables: Mapping[str, Any]


class Number(NamedTuple):
    """A field with a number: its type, range and default."""

    kind: type
    least: float
    most: float
    default: Any


NUMBERS = {
    "temperature": Number(float, 0, 2, 1.0),
    "top_p": Number(float, 0, 1, 1.0),
    "top_k": Number(int, 0, 10**9, 0),
    "n": Number(int, 1, 128, 1),
    "max_tokens": Number(int, 1, 10**9, None),
    "max_completion_tokens": Number(int, 1, 10**9, None),
    "seed": Number(int, -(2**63), 2**64 - 1, None),
}
SHARED = frozenset((*NUMBERS, "model", "stop", "stream", "stream_options", "logprobs", "response_format"))
FIELDS = {
    True: SHARED | {"messages", "top_logprobs", "chat_template_kwargs"},
    False: SHARED - {"max_completion_tokens"} | {"prompt"},
}
"""Fields of chat completions (True) and of completions."""


def parse(body: bytes, chat: bool) -> Asked:
    """The request in an untrusted body.

    Raises:
        Refused: it is not JSON, or a field is missing, unknown, or has a value that cannot be used.
    """
    asked = _object(body)
    _check_fields(asked, chat)
    numbers = {name: _number(name, one, asked.get(name)) for name, one in NUMBERS.items()}
    most, other = numbers["max_tokens"], numbers["max_completion_tokens"]
    if most is not None and other is not None and most != other:
        raise Refused(
            f"max_tokens is {most} and max_completion_tokens is {other}: give one of them", "max_completion_tokens"
        )
    seed, temperature = numbers["seed"], numbers["temperature"]
    settings = Settings(
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=numbers["top_p"],
        top_k=numbers["top_k"],
        seed=(secrets.randbits(32) if seed is None else seed) & 0xFFFFFFFF,
        max_tokens=most if other is None else other,
        stop=_stop(asked.get("stop")),
        alternatives=_alternatives(asked, chat),
        schema=_schema(asked.get("response_format")),
    )
    options = _typed("stream_options", asked.get("stream_options"), dict, "an object", {})
    variables = _typed("chat_template_kwargs", asked.get("chat_template_kwargs"), dict, "an object", {})
    return Asked(
        model=_typed("model", asked.get("model"), str, "a string"),
        prompts=[_messages(asked.get("messages"))] if chat else _prompts(asked.get("prompt")),
        chat=chat,
        n=numbers["n"],
        stream=_typed("stream", asked.get("stream"), bool, "true or false", False),
        usage=_typed(
            "stream_options.include_usage", options.get("include_usage"), bool, "true or false", False
        ),
        settings=settings,
        variables=variables,
    )  # fmt: skip


def _object(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        asked = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(asked, dict):
        raise Refused(f"the body is {shown(asked)}; it should be a JSON object")
    return asked


def _check_fields(asked: Mapping[str, Any], chat: bool) -> None:
    known = FIELDS[chat]
    for name, value in asked.items():
        if name in known or name in WITHOUT_EFFECT:
            continue
        if name not in UNSUPPORTED:
            hint = nearest(name, known) if len(name) < LONGEST_NAME else ""
            raise Refused(f"unknown field {shown(name)}{hint}", name[:LONGEST_NAME], code="unknown_parameter")
        nothing = UNSUPPORTED[name]
        if value is not None and value != nothing:
            raise Refused(
                f"{name} is {shown(value)}, which this server does not support: leave it out", name,
                code="unsupported_parameter",
            )  # fmt: skip


def _typed(name: str, value: Any, kind: type, wanted: str, default: Any = ...) -> Any:
    if value is None and default is not ...:
        return default
    if not isinstance(value, kind):
        told = "is missing" if value is None else f"is {shown(value)}"
        raise Refused(f"{name} {told}; it should be {wanted}", name)
    return value


def _number(name: str, wanted: Number, value: Any) -> Any:
    if value is None:
        return wanted.default
    exact = int if wanted.kind is int else (int, float)
    good = isinstance(value, exact) and not isinstance(value, bool) and wanted.least <= value <= wanted.most
    if not good:
        kind = "an integer" if wanted.kind is int else "a number"
        raise Refused(f"{name} is {shown(value)}; it should be {kind} from {wanted.least} to {wanted.most}", name)
    return wanted.kind(value)


def _stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if found is None:
        return ()
    good = isinstance(found, list) and len(found) <= MOST_STOPS
    if not good or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in found):
        raise Refused(
            f"stop is {shown(value)}; it should be a string, or at most {MOST_STOPS} of them, each of 1 to "
            f"{LONGEST_STOP} characters", "stop",
        )  # fmt: skip
    return tuple(found)


def _alternatives(asked: Mapping[str, Any], chat: bool) -> int | None:
    """The number of alternatives to each token, None without log-probabilities."""
    if not chat:
        return _number("logprobs", Number(int, 0, ALTERNATIVES, None), asked.get("logprobs"))
    wanted = _typed("logprobs", asked.get("logprobs"), bool, "true or false", False)
    most = _number("top_logprobs", Number(int, 0, ALTERNATIVES, None), asked.get("top_logprobs"))
    if most and not wanted:
        raise Refused(f"top_logprobs is {most}; it needs logprobs true", "top_logprobs")
    return (most or 0) if wanted else None


def _schema(value: Any) -> Mapping[str, Any] | None:
    form = _typed("response_format", value, dict, "an object", {"type": "text"})
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise Refused(
            f"response_format.type is {shown(kind)}; it should be text, json_object or json_schema", "response_format"
        )
    given = _typed("response_format.json_schema", form.get("json_schema"), dict, "an object")
    return _typed("response_format.json_schema.schema", given.get("schema"), dict, "a JSON schema, an object")


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        told = "is missing" if value is None else f"is {shown(value)}"
        raise Refused(f"messages {told}; it should be a list of messages with at least one", "messages")
    found = [_message(f"messages[{number}]", one) for number, one in enumerate(value)]
    if found[-1]["role"] not in ("user", "tool"):
        raise Refused(
            f"the last message has the role {found[-1]['role']}; it should be the user's, which is answered", "messages"
        )
    return found


def _message(where: str, value: Any) -> dict[str, Any]:
    turn = _typed(where, value, dict, 'an object {"role": …, "content": …}')
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(f"{where}.role is {shown(role)}; it should be one of {', '.join(ROLES)}", f"{where}.role")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Refused(f"{where}: this server does not support tool calls", f"{where}.tool_calls")
    return {"role": ROLES[role], "content": _content(f"{where}.content", turn.get("content"))}


def _content(where: str, value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    found = [_part(part) for part in value] if isinstance(value, list) and value else [None]
    if None in found:
        raise Refused(f"{where} is {shown(value)}; it should be a string, or parts of type text", where)
    return _text("".join(part for part in found if part))


def _part(value: Any) -> str | None:
    """The text of a part of a message; None for a part of another type."""
    text = value.get("text") if isinstance(value, dict) and value.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _prompts(value: Any) -> list[Any]:
    """Prompts as texts or as token ids."""

    def is_tokens(one: Any) -> bool:
        return isinstance(one, list) and bool(one) and all(type(token) is int for token in one)

    prompts = [value] if isinstance(value, str) or is_tokens(value) else value
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(one, str) or is_tokens(one) for one in prompts)
    ):
        told = "is missing" if value is None else f"is {shown(value)}"
        raise Refused(f"prompt {told}; it should be a string, token ids, or a list of either", "prompt")
    return [_text(one) if isinstance(one, str) else one for one in prompts]


def _text(value: str) -> str:
    """The text without lone surrogates, which are not valid in UTF-8."""
    return value.encode(errors="replace").decode()


def finite(value: float) -> float:
    """A log-probability that JSON can hold: a token that cannot be sampled has -9999, as in the protocol."""
    return value if math.isfinite(value) else -9999.0
