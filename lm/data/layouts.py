"""Conversion of common row layouts to the canonical form that the stages read.

`canonical` gives every row these columns: `text` of a document; `messages` of a conversation; `prompt` (a list of turns),
with `completion`, or with `chosen` and `rejected`. A turn is {"role", "content"} and its flags. Nothing is refused here: an
invalid value stays as it is, and `lm.data.chat` refuses it by name.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lm.data import json_text

Row = Mapping[str, Any]
Turn = dict[str, Any]

# Names of roles in other layouts.
ROLE_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
TALK_COLUMNS = ("messages", "conversations")  # whole conversations
ANSWER_COLUMNS = ("chosen", "rejected", "completion")
SYSTEM_COLUMNS = ("system", "system_prompt")
VARIABLE_COLUMN = "chat_template_kwargs"  # variables of a published model's chat template
TOOL_COLUMNS = ("tools", "functions")  # definitions of tools; functions: without the wrapping of tools
EMPTY: tuple[Any, ...] = (None, "", [], {}, ())  # values of a flag that mean nothing
EMPTY_MARKS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "refusal")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # Anthropic's helpful and harmless: a conversation in one string


class Layout(NamedTuple):
    """Column names of a layout: the prompt `ask`, optional `context` appended to it, and the first of `answers`.

    `beside_messages`: also applies where another column has a whole conversation, which SFT then trains on.
    """

    ask: str
    context: tuple[str, ...]
    answers: tuple[str, ...]
    beside_messages: bool = False


LAYOUTS = (
    Layout("prompt", (), ("completion", "response", "answer"), beside_messages=True),
    Layout("question", (), ("answer", "response", "completion", "output"), beside_messages=True),
    Layout("instruction", ("input", "context"), ("output", "response", "completion", "answer")),  # Alpaca, Dolly
    Layout("query", (), ("response", "answer", "completion", "output")),
    Layout("input", (), ("output", "response", "completion", "answer")),
)

READ_COLUMNS = frozenset((
    "text", "label", "tie", "margin", "history", "answer", "final", *TALK_COLUMNS, *ANSWER_COLUMNS, *SYSTEM_COLUMNS,
    *TOOL_COLUMNS,
    *(name for layout in LAYOUTS for name in (layout.ask, *layout.context, *layout.answers)),
))  # fmt: skip


def canonical(row: Row) -> dict[str, Any]:
    """Convert a row to the canonical form; other columns stay, `null` columns are dropped. Never fails; idempotent."""
    found = {str(name): value for name, value in row.items() if value is not None}
    talks = [found.pop(name) for name in TALK_COLUMNS if name in found]
    if talks:
        found["messages"] = _conversation(talks[0])
    for name in ANSWER_COLUMNS:
        if name in found:
            found[name] = _turns_or_text(found[name])
    layout = next(
        (one for one in LAYOUTS if one.ask in found and (one.beside_messages or "messages" not in found)), None
    )
    if layout is not None:
        found = _asked(found, layout)
    elif talks and any(side in found for side in ANSWER_COLUMNS) and _last_role(found["messages"]) == "user":
        found["prompt"] = found.pop("messages")  # answers beside the conversation
    return _with_system(_with_tools(found))


@functools.lru_cache(maxsize=1024)
def read_columns(
    names: frozenset[str], kind: Literal["documents", "conversations", "pairs", "judged", "prompts"]
) -> frozenset[str]:
    """Names of the row's non-null columns that stages of a kind read, by `canonical`'s rules."""
    if kind == "documents":
        return names & {"text"}
    talk = frozenset([name for name in TALK_COLUMNS if name in names][:1])
    layout = next((one for one in LAYOUTS if one.ask in names and (one.beside_messages or not talk)), None)
    ask, answer = frozenset[str](), frozenset[str]()
    if layout is not None:
        history = ("history",) if layout.ask == "instruction" else ()
        ask = frozenset((layout.ask, *layout.context, *history))
        answer = frozenset([name for name in layout.answers if name in names][:1])
    read = {
        "conversations": talk or ask | answer,
        "pairs": (ask or talk) | {"chosen", "rejected", "tie"},
        "judged": (ask or talk) | answer | {"completion", "label"},
        "prompts": ask or talk or frozenset(("chosen", "rejected")),
    }[kind]
    return names & (read | set(SYSTEM_COLUMNS))


def as_text(value: Any) -> Any:
    """Convert a number to text, as verifiers read it; other values stay as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(value) if isinstance(value, int) or math.isfinite(value) else value


def flag(value: Any) -> bool | None:
    """Parse a boolean: true or false, 1 or 0, or their CSV spellings; None for anything else."""
    if isinstance(value, str):
        value = value.strip().lower().removesuffix(".0")  # as tables write a column of flags with a gap
        return {"true": True, "1": True, "false": False, "0": False}.get(value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def _last_role(turns: Any) -> Any:
    last = turns[-1] if isinstance(turns, list) and turns else None
    return last.get("role") if isinstance(last, Mapping) else None


def _asked(found: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Convert a row of this layout: `prompt` becomes a list of turns, and the answer, if any, `completion`."""
    ask = as_text(found.pop(layout.ask))
    for name in layout.context:
        context = found.get(name, "")
        if isinstance(ask, str) and isinstance(context, str):
            found.pop(name, None)
            ask = f"{ask}\n\n{context}" if context.strip() else ask
    prompt = _prompt_turns(ask) if isinstance(ask, str) else _conversation(ask)
    if layout.ask == "instruction" and isinstance(prompt, list):
        prompt = _conversation([*_history(found.pop("history", [])), *prompt])
    answer = next((name for name in layout.answers if name in found), None)
    if answer is not None and not {"chosen", "rejected"} & set(found):
        # The column `answer` stays: verifiers read it.
        found["completion"] = _turns_or_text(found[answer] if answer == "answer" else found.pop(answer))
    return found | {"prompt": prompt}


def _prompt_turns(text: str) -> Any:
    turns = _turns_or_text(text)
    if isinstance(turns, str):
        return [{"role": "user", "content": turns}]
    # "… Assistant:" at the end asks for the answer.
    return turns[:-1] if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""} else turns


def _history(history: Any) -> list[Any]:
    """Convert Alpaca's history, pairs of (prompt, answer), to turns."""
    if not isinstance(history, Sequence) or isinstance(history, str):
        return [history]
    turns: list[Any] = []
    for pair in (pair for pair in history if pair is not None):
        if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
            turns += [
                {"role": role, "content": as_text(said)} for role, said in zip(("user", "assistant"), pair, strict=True)
            ]
        else:
            turns.append(pair)
    return turns


def _with_tools(found: dict[str, Any]) -> dict[str, Any]:
    """Parse the definitions of tools, where they are JSON text; those of `functions` get the wrapping of `tools`."""
    for name in TOOL_COLUMNS:
        if name in found:
            found[name] = (
                [_parsed(one) for one in listed] if isinstance(listed := _list_in(found[name]), list) else listed
            )
    functions = found.get("functions")
    if isinstance(functions, list) and functions and not found.get("tools"):
        found["tools"] = [{"type": "function", "function": one} for one in found.pop("functions")]
    return found


def _list_in(value: Any) -> Any:
    """A value, JSON text parsed, as a list; what is no list and no object stays."""
    value = _parsed(value)
    return [value] if isinstance(value, Mapping) and value else list(value) if isinstance(value, tuple) else value


def _calls_in(value: Any) -> list[Any]:
    """The calls that a value holds, each a function's name and arguments, with the wrapping of `tool_calls`; else none."""
    calls = _list_in(value)
    if not isinstance(calls, list) or not all(isinstance(one, Mapping) and one.get("name") for one in calls):
        return []
    return [{"type": "function", "function": one} for one in calls]


def _parsed(value: Any) -> Any:
    """JSON text of a list or an object, parsed; other values stay."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json_text.loads(value)
        except ValueError:
            return value
    return value


def _with_system(found: dict[str, Any]) -> dict[str, Any]:
    """Move the system column to the front of the conversation, unless that has another system turn."""
    for name in SYSTEM_COLUMNS:
        system = found.get(name)
        if isinstance(system, str) and not system.strip():
            del found[name]
        elif isinstance(system, str):
            holders: list[str] = [column for column in ("messages", "prompt") if column in found]
            holders = holders or [side for side in ("chosen", "rejected") if isinstance(found.get(side), list)]
            led: dict[str, Any] = {column: _led(found[column], system) for column in holders}
            if led and None not in led.values():
                del found[name]
                found |= led
    return found


def _led(turns: Any, system: str) -> list[Any] | None:
    """Prepend the system turn; None where `turns` is not a conversation or has another system turn."""
    if not isinstance(turns, list):
        return None
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns if first.get("content") == system else None


def _conversation(value: Any) -> Any:
    """Convert turns to a list of {"role", "content"}; also reads a single turn, JSON text, or a dialogue in a string."""
    if isinstance(value, str):
        value = _turns_or_text(value)
    if isinstance(value, Mapping):
        value = _listed(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return [_turn(turn) for turn in value if turn is not None]


def _listed(turns: Mapping[str, Any]) -> list[Any]:
    """A turn as a list of one; lists of roles and of contents, as the datasets library may save turns, as turns."""
    lists = {name: values for name, values in turns.items() if isinstance(values, list)}
    if len(lists) < len(turns) or not {"role", "from"} & set(lists) or len(set(map(len, lists.values()))) != 1:
        return [turns]
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _turns_or_text(value: Any) -> Any:
    """Convert an answer or prompt: text stays unless it spells turns; a number becomes text."""
    value = as_text(value)
    if not isinstance(value, str):
        return _conversation(value)
    if value.lstrip().startswith("Human:") and "\n\nAssistant:" in value:
        parts = HH_TURN.split("\n\n" + value.lstrip())[1:]
        names = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": names[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
    if re.match(r"\s*\[\s*\{", value):
        try:
            turns = json_text.loads(value)
        except ValueError:
            return value
        if all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns):
            return _conversation(turns)
    return value


def _turn(turn: Any) -> Any:
    """Convert a turn to {"role", "content"} and its other keys that are not empty; text parts are joined.

    A `function_call`, as a key or as the role of a turn, becomes one of `tool_calls`, beside which null content stays.
    """
    if not isinstance(turn, Mapping):
        return turn
    made: Turn = {str(name): value for name, value in turn.items() if value is not None}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in made and ours not in made:
            made[ours] = made.pop(theirs)
    for name in EMPTY_MARKS:
        if name in made and made[name] in EMPTY:
            del made[name]
    if isinstance(made.get("role"), str):
        role = made["role"].lower()
        made["role"] = ROLE_NAMES.get(role, role)
    key = "content" if made.get("role") == "function_call" else "function_call"
    if "tool_calls" not in made and (calls := _calls_in(made.get(key))):
        del made[key]
        made |= {"role": "assistant", "content": made.get("content"), "tool_calls": calls}
    elif "tool_calls" in made:
        calls = _list_in(made["tool_calls"])
        made["tool_calls"] = [_parsed(one) for one in calls] if isinstance(calls, list) else calls
        if turn.get("content", "") is None:
            made["content"] = None
    if isinstance(made.get("content"), list | tuple):
        made["content"] = _joined(made["content"])
    return made


def _joined(parts: Sequence[Any]) -> Any:
    """Join content parts that are all text; other parts stay as they are."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else list(parts)  # type: ignore[arg-type]
