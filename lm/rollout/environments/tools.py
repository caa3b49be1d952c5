"""Tools that a model calls by text, and the reading of its calls.

A model with a chat template writes calls as its template tells it to: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes,
Qwen), or a turn that is nothing but `{"name": …, "parameters": {…}}` (Llama 3). A model trained from random weights has a short form,
`<tool>NAME: TEXT</tool>`, whose text is the tool's first argument.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm.config.field import shown

LONGEST_RESULT = 2_000  # characters of a reply; the rest is left out, and the reply says so
CALLS_A_TURN = 8

_TAGS = re.compile(r"<(tool_call|tool)>(.*?)(</\1>|\Z)", re.DOTALL)
_LLAMA = re.compile(r"\s*(?:<\|python_tag\|>)?\s*(\{\s*\"(?:name|type)\".*)", re.DOTALL)
KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
}


class ToolError(ValueError):
    """Raised by a tool for arguments that it cannot use; the message is the model's reply."""


@dataclass(frozen=True)
class Tool:
    """A tool: `call(**arguments)` gives the text of the reply, or raises ToolError.

    `parameters` has the JSON type of each argument by name, one of KINDS; all are required.
    """

    name: str
    description: str
    parameters: Mapping[str, str]
    call: Callable[..., str]

    def __post_init__(self) -> None:
        """Raises ValueError for a type that is none of KINDS."""
        if unknown := [kind for kind in self.parameters.values() if kind not in KINDS]:
            raise ValueError(f"tool {self.name}: a parameter has type {unknown[0]!r}; there are {', '.join(KINDS)}")

    @property
    def definition(self) -> dict[str, Any]:
        """The definition that a chat template shows to the model: a function with the JSON schema of its arguments."""
        fields = {name: {"type": kind} for name, kind in self.parameters.items()}
        schema = {"type": "object", "properties": fields, "required": list(fields)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": schema},
        }


@dataclass(frozen=True)
class ToolReply:
    """The reply to one call, and whether the call failed."""

    text: str
    failed: bool


def tool_replies(text: str, tools: Sequence[Tool]) -> list[ToolReply]:
    """The replies to all calls in a model's turn, in order; empty if it has none. A call that cannot be made gets a reply that says why."""
    calls = list(_TAGS.finditer(text))
    if calls:
        found = [_reply(match[1], match[2], bool(match[3]), tools) for match in calls[:CALLS_A_TURN]]
        over = f"Error: a turn has at most {CALLS_A_TURN} calls; {len(calls) - CALLS_A_TURN} were not made."
        return [*found, *([ToolReply(over, True)] if len(calls) > CALLS_A_TURN else [])]
    whole = _LLAMA.fullmatch(text)
    return [_reply("tool_call", whole[1], True, tools)] if whole else []


def _reply(form: str, body: str, closed: bool, tools: Sequence[Tool]) -> ToolReply:
    try:
        if not closed:
            raise ToolError(f"the call is cut off: there is no </{form}>")
        tool, given = (_short_call if form == "tool" else _json_call)(body, {tool.name: tool for tool in tools})
        _check_arguments(tool, given)
        text = tool.call(**given)
    except ToolError as error:
        return ToolReply(_shortened(f"Error: {error}"), True)
    if not isinstance(text, str):
        raise TypeError(f"the tool {tool.name} gave {shown(text)}; a tool returns text")
    return ToolReply(_shortened(text), False)


def _shortened(text: str) -> str:
    left = len(text) - LONGEST_RESULT
    return text if left <= 0 else f"{text[:LONGEST_RESULT]} … ({left} characters left out)"


def _short_call(body: str, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """The tool and arguments of `NAME: TEXT`; the text of an argument that is no string is JSON."""
    name, colon, text = body.partition(":")
    if not colon:
        raise ToolError("a call is <tool>NAME: TEXT</tool>")
    tool = _tool(name.strip(), tools)
    first = list(tool.parameters.items())[:1]
    return tool, {name: text.strip() if kind == "string" else _read_json(text) for name, kind in first}


def _json_call(body: str, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """The tool and arguments of `{"name": …, "arguments": {…}}`."""
    call = _read_json(body)
    call = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ToolError('a call is {"name": NAME, "arguments": {…}}')
    tool, given = _tool(call["name"], tools), call.get("arguments", call.get("parameters", {}))
    if not isinstance(given, dict):
        raise ToolError(f"the arguments of {tool.name} are an object: {', '.join(tool.parameters)}")
    return tool, given


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ToolError("the call is not valid JSON") from None


def _check_arguments(tool: Tool, given: Mapping[str, Any]) -> None:
    """Raise ToolError unless the arguments are those of the tool, each of its type."""
    wrong = [name for name in given if name not in tool.parameters]
    wrong += [name for name, kind in tool.parameters.items() if not _has_type(given.get(name), kind)]
    if wrong:
        wanted = ", ".join(f"{name} ({kind})" for name, kind in tool.parameters.items()) or "no arguments"
        raise ToolError(f"{tool.name} takes {wanted}; {wrong[0]:.40} is missing, unknown or of another type")


def _has_type(value: Any, kind: str) -> bool:
    """Whether a value has the JSON type; NaN and infinity, which Python reads, have none."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and isinstance(value, KINDS[kind]) and (kind == "boolean") == isinstance(value, bool)


def _tool(name: str, tools: Mapping[str, Tool]) -> Tool:
    if name not in tools:
        raise ToolError(f"there is no tool {name[:40]!r}; there are {', '.join(tools)}")
    return tools[name]
