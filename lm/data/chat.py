"""Conversations: validation, and extraction from rows."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from lm.config.field import shown
from lm.data import bad_rows
from lm.data.bad_rows import BadRow, Unreadable, missing_columns
from lm.data.chatml import REASONING_KEYS
from lm.data.layouts import LAYOUTS, SYSTEM_COLUMNS, TOOL_COLUMNS, VARIABLE_COLUMN, canonical, flag
from lm.data.split import canonical_json
from lm.data.text_tokenizer import LossOn, Message, Rendered, TextTokenizer, Tools, Variables

ROLES = ("system", "user", "assistant", "tool")
FOLLOWING = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}  # fmt: skip
NO_PLACE = "answers that are labelled or collected are kept without them; leave such prompts out"
LARGEST_MARGIN = 3e38  # of a float32
SHOWN_BEFORE = 20  # characters shown before the place where two prompts differ
NO_VARIABLES: Variables = {}
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of a chat template that a row cannot set by name."""
MARKS = ("weight", "train", "loss")  # flags of a turn: 0 takes it out of the loss
READ_KEYS = frozenset(
    (
        "role",
        "content",
        "from",
        "value",
        *MARKS,
        "tool_calls",
        "function_call",
        *REASONING_KEYS,
        "type",
        "text",
        "train_detail",
    )
)


class ChatInput(NamedTuple):
    """A conversation, the definitions of the tools that the assistant may call in it, and variables of the chat template."""

    messages: list[dict[str, Any]]
    tools: Tools = None
    variables: Variables = NO_VARIABLES


def render(
    messages: Sequence[Message],
    tokenizer: TextTokenizer,
    generation_prompt: bool = False,
    loss_on: LossOn = "answers",
    learn_end: bool = True,
    where: str = "",
    tools: Tools = None,
    variables: Variables = NO_VARIABLES,
) -> Rendered:
    """Render messages in the tokenizer's chat format; see `TextTokenizer.render`. A BadRow that it raises names `where`."""
    try:
        return tokenizer.render(messages, generation_prompt, loss_on, learn_end, tools, variables)
    except BadRow as error:
        hint = ""
        if error.reason == bad_rows.TEMPLATE and (texts := _with_text_arguments(messages)) != list(messages):
            with contextlib.suppress(BadRow):
                tokenizer.render(texts, generation_prompt, loss_on, learn_end, tools, variables)
                hint = "; this template takes the arguments of a tool call as JSON text, and here they are an object"
        raise BadRow(f"{where}: {error}{hint}" if where else f"{error}{hint}", error.reason) from error


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of their tool calls as JSON text."""

    def changed(call: Any) -> Any:
        if "function" in call:
            return {**call, "function": changed(call["function"])}
        given = call.get("arguments")
        return {**call, "arguments": json.dumps(given)} if isinstance(given, Mapping) else call

    return [
        {**turn, "tool_calls": [changed(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]


def plain_prompt(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """`prompt_messages` of a row whose answer is kept without tools and template variables. Raises BadRow for such rows."""
    refuse_tools(row, where)
    return prompt_messages(row, where)


def refuse_tools(row: Mapping[str, Any], where: str) -> None:
    """Raise BadRow for definitions of tools and for template variables, which would be lost with the answers."""
    if tools_of(row, where):
        raise BadRow(f"{where}: the prompt has tools, and {NO_PLACE}", bad_rows.TOOLS)
    if variables_of(row, where):
        raise BadRow(f"{where}: the prompt has {VARIABLE_COLUMN}, and {NO_PLACE}", bad_rows.VARIABLES)


def tools_of(row: Mapping[str, Any], where: str) -> Tools:
    """The definitions of tools in a row's column `tools` (or `functions`), a list or its JSON text; None where there are none."""
    for name in TOOL_COLUMNS:
        value = canonical({name: row.get(name)}).get("tools", row.get(name))
        if isinstance(value, list) and any(value):
            if not all(isinstance(one, Mapping) and one for one in value):
                raise BadRow(f"{where}: {name} must be a list of tool definitions, found {value!r:.60}", bad_rows.TOOLS)
            return value
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")) and value.strip() not in ("[]", "{}"):
            raise BadRow(f"{where}: {name} is not valid JSON: {value!r:.60}", bad_rows.TOOLS)
    return None


def variables_of(row: Mapping[str, Any], where: str) -> Variables:
    """The variables that a row gives the chat template, in its column `chat_template_kwargs`: an object, or its JSON text."""
    value = row.get(VARIABLE_COLUMN)
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError, RecursionError):  # of no JSON: it stays a text, and is refused
            value = json.loads(value)
    if value in (None, "", {}):
        return NO_VARIABLES
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise BadRow(f"{where}: {VARIABLE_COLUMN} must be an object, found {value!r:.60}", bad_rows.VARIABLES)
    if taken := [name for name in value if name in GIVEN]:
        raise BadRow(
            f"{where}: {VARIABLE_COLUMN} has {taken[0]}, which comes from the row's other columns", bad_rows.VARIABLES
        )
    return {name: one for name, one in value.items() if one is not None}


def check_conversation(messages: Any, where: str, needs_answer: bool = True) -> None:
    """Raise BadRow unless `messages` alternate as [system] user assistant user assistant …; names `where` and the turn.

    After an assistant's turn there may be tool turns, and the assistant's again. With `needs_answer` the last turn must be the
    assistant's; without, the user's or a tool's.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRow(
            f"{where}: a conversation must be a list of turns with at least one, found {shown(messages, 60)}",
            bad_rows.TURNS,
        )
    before = ""
    for number, turn in enumerate(messages, start=1):
        spot = f"{where}, turn {number}"
        _check_turn(turn, spot)
        role = turn["role"]
        if role not in FOLLOWING[before]:
            raise BadRow(f"{spot}: {_misplaced(role, before)}", bad_rows.TURNS)
        before = role
    last, wanted = messages[-1]["role"], "assistant" if needs_answer else "user"
    if last != wanted and (needs_answer or last != "tool"):
        raise BadRow(
            f"{where}, turn {len(messages)}: the last turn must be the {wanted}'s, found the {last}'s", bad_rows.TURNS
        )


def _check_turn(turn: Any, spot: str) -> None:
    """Raise BadRow unless the turn is a role and a text, or calls of tools, with flags that can be honoured."""
    found: Mapping[str, Any] = turn if isinstance(turn, Mapping) else {}
    calls = found.get("tool_calls")
    if found.get("role") == "function_call" or found.get("function_call") or (calls and not _are_calls(calls)):
        name = "tool_calls" if calls else "function_call"
        raise BadRow(
            f"{spot}: {name} must have the name and the arguments of each function, found {shown(turn, 80)}",
            bad_rows.TOOLS,
        )
    if calls and found.get("role") != "assistant":
        raise BadRow(
            f"{spot}: tool_calls are the assistant's, found the role {shown(found.get('role'), 60)}", bad_rows.TOOLS
        )
    for key in REASONING_KEYS:
        if not isinstance(found.get(key) or "", str):
            raise BadRow(f"{spot}: {key} must be a string, found {shown(found[key], 60)}", bad_rows.REASONING)
    if not {"role", "content"} <= set(found) and not (calls and "role" in found):
        raise BadRow(f'{spot}: a turn must be {{"role": …, "content": …}}, found {shown(turn, 60)}', bad_rows.TURNS)
    role, content = found["role"], found.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{spot}: unknown role {shown(role, 60)}; the roles are {', '.join(ROLES)}", bad_rows.TURNS)
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRow(
            f"{spot}: the content must be a string, or text parts, found {shown(content, 60)}", bad_rows.CONTENT
        )
    for key in MARKS:
        if key in found and found[key] is not None and flag(found[key]) is None:
            raise BadRow(f"{spot}: {key} must be 0 or 1, found {shown(found[key], 60)}", bad_rows.FLAG)
    if found.get("train_detail"):
        raise BadRow(
            f"{spot}: train_detail is not supported; the loss covers a whole turn or none of it (train 0 or 1)",
            bad_rows.FLAG,
        )


def _are_calls(calls: Any) -> bool:
    """Whether every call has the name of a function."""
    if not isinstance(calls, list) or not all(isinstance(one, Mapping) for one in calls):
        return False
    functions = [one.get("function", one) for one in calls]
    return all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in functions)


def _misplaced(role: str, before: str) -> str:
    if role == "system":
        return "a system turn can only be the first"
    if role == "user":
        return "two user turns in a row; an assistant turn must come between them"
    if not before:
        return f"a conversation cannot begin with the {role}"
    if role == "tool":
        return "a tool turn must follow an assistant turn or another tool turn"
    return "an assistant turn must follow a user turn"


def as_messages(prompt: str | Sequence[Message], role: str = "user") -> list[dict[str, Any]]:
    """Turn a string into one message of `role`, and checked turns into plain dicts with `train` False where flagged."""
    if isinstance(prompt, str):
        return [{"role": role, "content": prompt}]
    return [
        {key: value for key, value in turn.items() if key not in (*MARKS, "train_detail")}
        | ({} if _marked_to_learn(turn) else {"train": False})
        for turn in prompt
    ]


def said_by(turn: Message) -> str:
    """Everything that a turn says: its reasoning, its content, and its calls of tools as JSON."""
    calls = turn.get("tool_calls")
    said = [*(turn.get(key) for key in REASONING_KEYS), turn.get("content"), canonical_json(calls) if calls else ""]
    return "\n".join(text for text in said if text)


def _marked_to_learn(turn: Message) -> bool:
    return all(flag(turn[key]) is not False for key in MARKS if turn.get(key) is not None)


def training_messages(row: Mapping[str, Any], where: str, loss_on: str = "answers") -> list[dict[str, Any]]:
    """The conversation that SFT trains on: `messages`, or `prompt` and `completion`, in any layout of `lm.data.layouts`.

    With a prompt and completion the loss covers the completion's turns only, unless `loss_on` is all.
    """
    found = _read(row, where)
    if "messages" in found:
        check_conversation(found["messages"], where)
        messages = as_messages(found["messages"])
        _check_learnt(found["messages"], where, loss_on)
        return messages
    if not {"prompt", "completion"} <= set(found):
        raise missing_columns(
            row, where, "this stage needs the columns messages, or question and answer, or prompt and completion"
        )
    prompt = _turns(found["prompt"], "user", where, _name_of("prompt", row))
    messages = _answered(prompt, found["completion"], where, _name_of("completion", row))
    if loss_on == "answers":
        for turn in messages[: min(len(prompt), len(messages) - 1)]:
            if turn["role"] == "assistant":
                turn["train"] = False
    return messages


def _check_learnt(turns: Sequence[Message], where: str, loss_on: str) -> None:
    """Raise BadRow where a flag asks for loss on a turn that the stage's loss does not cover."""
    for number, turn in enumerate(turns, start=1):
        asked = [key for key in ("train", "loss") if flag(turn.get(key))]
        if asked and turn["role"] != "assistant" and loss_on == "answers":
            raise BadRow(
                f"{where}, turn {number}: {asked[0]} asks for loss on a {turn['role']} turn, and the stage's loss covers "
                "assistant turns only; objective.loss_on all covers every turn that is not flagged 0",
                bad_rows.FLAG,
            )


def prompt_messages(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The prompt of a row: `prompt`, `question`, or `messages` (or a `chosen` conversation) without the last answer."""
    found = _read(row, where)
    if "prompt" in found:
        messages: Any = _turns(found["prompt"], "user", where, _name_of("prompt", row))
    elif "messages" in found:
        messages = found["messages"]
        if isinstance(messages, list) and messages and _role(messages[-1]) == "assistant":
            messages = messages[:-1]
    elif (implied := implied_prompt(found)) is not None:
        messages = implied
    else:
        raise missing_columns(row, where, "this stage needs the columns prompt, question or messages")
    check_conversation(messages, where, needs_answer=False)
    return as_messages(messages)


def preference_messages(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The chosen and the rejected conversation of a row with `prompt`, `chosen`, `rejected`: they differ in the last turn.

    An answer may be a whole conversation that begins with the prompt; where both are, `prompt` may be absent.
    """
    found = _read(row, where)
    if not {"chosen", "rejected"} <= set(found) or ("prompt" not in found and implied_prompt(found) is None):
        raise missing_columns(row, where, "this stage needs the columns prompt, chosen and rejected")
    prompt = prompt_messages(row, where) if "prompt" in found else []
    chosen, rejected = (_answered(prompt, found[side], where, side) for side in ("chosen", "rejected"))
    _check_same(chosen[:-1], rejected[:-1], where, ("chosen", "rejected"))
    return chosen, rejected


def judged_messages(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], bool]:
    """The conversation of a row with `prompt`, `completion`, `label`, and whether its answer is desirable."""
    found = _read(row, where)
    if not {"prompt", "completion", "label"} <= set(found):
        raise missing_columns(
            row, where, "this stage needs the columns prompt, completion and label, or prompt, chosen and rejected"
        )
    label = flag(found["label"])
    if label is None:
        raise BadRow(
            f"{where}: label must be true (desirable) or false (or 1 or 0), found {found['label']!r:.60}", bad_rows.FLAG
        )
    return _answered(prompt_messages(row, where), found["completion"], where, _name_of("completion", row)), label


def margin_of(row: Mapping[str, Any], where: str) -> float:
    """The row's `margin`: by how much the chosen answer is better; 0 if absent."""
    margin = row.get("margin")
    if margin is None or margin == "":
        return 0.0
    try:
        value = math.nan if isinstance(margin, bool) or not isinstance(margin, int | float | str) else float(margin)
    except (ValueError, OverflowError):
        value = math.nan
    if not 0 <= value <= LARGEST_MARGIN:
        raise BadRow(f"{where}: margin must be a finite number of 0 or more, found {margin!r:.60}", bad_rows.FLAG)
    return value


def is_tie(row: Mapping[str, Any], where: str) -> bool:
    """The row's `tie`: whether neither answer is better; False if absent."""
    tie = row.get("tie")
    if tie is None or tie == "":
        return False
    if (found := flag(tie)) is None:
        raise BadRow(f"{where}: tie must be true or false (or 1 or 0), found {tie!r:.60}", bad_rows.FLAG)
    return found


def implied_prompt(row: Mapping[str, Any]) -> list[Any] | None:
    """The shared prompt of whole conversations in `chosen` and `rejected`, unchecked; None where a prompt column exists."""
    if row.get("prompt") is not None or not all(isinstance(row.get(side), list) for side in ("chosen", "rejected")):
        return None
    return row["chosen"][:-1] or None


def _read(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The canonical row. Raises BadRow for what is not a row, and for columns whose meaning is not supported."""
    if isinstance(row, Unreadable):
        raise row.error
    found = canonical(row)
    for name in SYSTEM_COLUMNS:
        if name in found:
            raise BadRow(
                f"{where}: the column {name} must be a text, and the same as the conversation's own system turn, found "
                f"{found[name]!r:.60}",
                bad_rows.SYSTEM,
            )
    return found


def _answered(prompt: list[dict[str, Any]], answer: Any, where: str, column: str) -> list[dict[str, Any]]:
    """The prompt followed by the answer, which may itself begin with the prompt.

    A system turn that only one of them has belongs to both; white space around the prompt's turns is ignored.
    """
    turns = _turns(answer, "assistant", where, column)
    if not (prompt and turns) or _role(turns[0]) == "assistant":
        conversation = [*prompt, *turns]
        check_conversation(conversation, f"{where}, {column}" if column in ("chosen", "rejected") else where)
        return as_messages(conversation)
    if _role(prompt[0]) == "system" != _role(turns[0]):
        turns = [prompt[0], *turns]
    elif _role(turns[0]) == "system" != _role(prompt[0]):
        prompt = [turns[0], *prompt]
    check_conversation(turns, f"{where}, {column}")
    _check_same(prompt, turns[: len(prompt)], where, ("prompt", column), strip=True)
    return as_messages(turns)


def _check_same(
    one: Sequence[Message], other: Sequence[Message], where: str, names: tuple[str, str], strip: bool = False
) -> None:
    """Raise BadRow where two prompts differ, naming the turn and showing each from there on."""
    for number, turns in enumerate(zip_longest(one, other), start=1):
        said = [
            (turn["role"], said_by(turn).strip() if strip else said_by(turn)) if turn else ("", "") for turn in turns
        ]
        if said[0] != said[1]:
            letters = enumerate(zip_longest(*(content for _, content in said)))
            at = max(0, next((place for place, (a, b) in letters if a != b), 0) - SHOWN_BEFORE)
            shown = [f"{role} {content[at:]!r:.60}" if role else "no such turn" for role, content in said]
            found = f"{names[0]} has {shown[0]}, {names[1]} has {shown[1]}"
            raise BadRow(f"{where}, turn {number}: {found}; both answers must be to the same prompt", bad_rows.PROMPTS)


def _turns(value: Any, role: str, where: str, column: str) -> list[dict[str, Any]]:
    """The turns of a column, unchecked."""
    if isinstance(value, str):
        return as_messages(value, role)
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow(
            f"{where}: {column} must be a string, a number or a list of turns, found {value!r:.60}", bad_rows.CONTENT
        )
    return [dict(turn) for turn in value]


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _name_of(column: str, row: Mapping[str, Any]) -> str:
    """The row's own name of the canonical column `prompt` or `completion`."""
    names = [layout.ask for layout in LAYOUTS] if column == "prompt" else ("completion", "response", "output", "answer")
    return next((name for name in names if row.get(name) is not None), column)
