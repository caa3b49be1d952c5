"""Conversations: what a valid one is, how rows become one, and the one renderer to tokens and mask (ChatML)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

from lm.data.tokenizer import TURN_END, TURN_START
from lm.experiment import UserError

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
LARGEST_MARGIN = 3e38  # of a float32
SHOWN_BEFORE = 20  # characters shown before the place where two prompts part


class Codec(Protocol):
    """What the renderer needs of a tokenizer."""

    @property
    def special_ids(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]: ...


class Rendered(NamedTuple):
    """Token ids, and for each 1 where the model learns to predict it."""

    tokens: list[int]
    mask: list[int]


def render(messages: Sequence[Message], tokenizer: Codec, generation_prompt: bool = False) -> Rendered:
    """ChatML: `<|im_start|>ROLE\\nCONTENT<|im_end|>\\n` for each message, then the assistant's header if asked for.

    The text between two special tokens is encoded as one string. The mask covers an assistant's content and
    its `<|im_end|>`; a token that straddles the header and the content is inside. Validates nothing.
    """
    start, end = tokenizer.special_ids[TURN_START], tokenizer.special_ids[TURN_END]
    newline = tokenizer.encode("\n")
    tokens: list[int] = []
    mask: list[int] = []
    for message in messages:
        header, content = message["role"] + "\n", message["content"]
        if message["role"] == "assistant":
            ids, starts = tokenizer.encode_offsets(header + content)
            ends = [*starts[1:], len(header) + len(content)]
            inside = [int(s >= len(header) or e > len(header)) for s, e in zip(starts, ends, strict=True)]
        else:
            ids = tokenizer.encode(header + content)
            inside = [0] * len(ids)
        tokens += [start, *ids, end, *newline]
        mask += [0, *inside, int(message["role"] == "assistant"), *([0] * len(newline))]
    if generation_prompt:
        header_ids = [start, *tokenizer.encode("assistant\n")]
        tokens += header_ids
        mask += [0] * len(header_ids)
    return Rendered(tokens, mask)


def check_conversation(messages: Any, where: str, needs_answer: bool = True) -> None:
    """Raise UserError, naming `where` and the turn, unless this is [system] user assistant user assistant ….

    With `needs_answer` the last turn must be the assistant's; without, the user's.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: a conversation must be a list of turns with at least one, found {messages!r:.60}")
    expected: tuple[str, ...] = ("system", "user")
    for number, turn in enumerate(messages, start=1):
        spot = f"{where}, turn {number}"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise UserError(f'{spot}: a turn must be {{"role": …, "content": …}}, found {turn!r:.60}')
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise UserError(f"{spot}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{spot}: the content must be a string, found {content!r:.60}")
        if role not in expected:
            raise UserError(f"{spot}: {_misplaced(role, number)}")
        expected = ("assistant",) if role == "user" else ("user",)
    last, wanted = messages[-1]["role"], "assistant" if needs_answer else "user"
    if last != wanted:
        raise UserError(f"{where}, turn {len(messages)}: the last turn must be the {wanted}'s, found the {last}'s")


def _misplaced(role: str, number: int) -> str:
    if role == "system":
        return "a system turn can only be the first"
    if role == "user":
        return "two user turns in a row; an assistant turn must come between them"
    if number == 1:
        return "a conversation cannot begin with the assistant"
    return "an assistant turn must follow a user turn"


def as_messages(prompt: str | Sequence[Message], role: str = "user") -> list[dict[str, str]]:
    """A string becomes one turn of `role`; a message list stays, as plain dicts."""
    if isinstance(prompt, str):
        return [{"role": role, "content": prompt}]
    return [dict(turn) for turn in prompt]


def training_messages(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The conversation to imitate: `messages`, or `question` and `answer` as a user and an assistant turn."""
    if "messages" in row:
        messages = row["messages"]
    elif "question" in row and "answer" in row:
        messages = [*as_messages(row["question"]), *as_messages(row["answer"], "assistant")]
    else:
        raise _missing(row, where, "messages, or question and answer")
    check_conversation(messages, where)
    return as_messages(messages)


def prompt_messages(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """What the model is asked: `prompt`, `question`, or `messages` (or a `chosen` conversation) without the last answer."""
    if "prompt" in row:
        messages = _turns(row["prompt"], "user", where, "prompt")
    elif "question" in row:
        messages = _turns(row["question"], "user", where, "question")
    elif "messages" in row:
        messages = row["messages"]
        if isinstance(messages, Sequence) and messages and _role(messages[-1]) == "assistant":
            messages = messages[:-1]
    elif (implied := implied_prompt(row)) is not None:
        messages = implied
    else:
        raise _missing(row, where, "prompt, question or messages")
    check_conversation(messages, where, needs_answer=False)
    return as_messages(messages)


def preference_messages(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The chosen and the rejected conversation of a row with `prompt`, `chosen`, `rejected`: they differ in the last turn.

    An answer may be a whole conversation, which begins with the prompt; where both are, there need be no `prompt`.
    """
    if not {"chosen", "rejected"} <= set(row) or ("prompt" not in row and implied_prompt(row) is None):
        raise _missing(row, where, "prompt, chosen and rejected")
    prompt = prompt_messages(row, where) if "prompt" in row else []
    chosen, rejected = (_answered(prompt, row[side], where, side) for side in ("chosen", "rejected"))
    _check_same(chosen[:-1], rejected[:-1], where, ("chosen", "rejected"))
    return chosen, rejected


def judged_messages(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], bool]:
    """The conversation of a row with `prompt`, `completion`, `label`, and whether its answer is desirable."""
    if not {"prompt", "completion", "label"} <= set(row):
        raise _missing(row, where, "prompt, completion and label, or prompt, chosen and rejected")
    if not isinstance(row["label"], bool):
        raise UserError(f"{where}: label must be true (desirable) or false, found {row['label']!r:.60}")
    return _answered(prompt_messages(row, where), row["completion"], where, "completion"), row["label"]


def margin_of(row: Mapping[str, Any], where: str) -> float:
    """By how much the chosen answer of a row is better: its `margin`, 0 where it has none."""
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= LARGEST_MARGIN:
        raise UserError(f"{where}: margin must be a finite number of 0 or more, found {margin!r:.60}")
    return float(margin)


def is_tie(row: Mapping[str, Any], where: str) -> bool:
    """Whether neither answer of a row is better: its `tie`, false where it has none."""
    tie = row.get("tie")
    if tie is not None and not isinstance(tie, bool):
        raise UserError(f"{where}: tie must be true or false, found {tie!r:.60}")
    return bool(tie)


def implied_prompt(row: Mapping[str, Any]) -> list[Any] | None:
    """What whole conversations in `chosen` and `rejected` ask, unchecked; None where a column says it, or they are answers."""
    if "prompt" in row or not all(isinstance(row.get(side), list) for side in ("chosen", "rejected")):
        return None
    return row["chosen"][:-1] or None


def _answered(prompt: list[dict[str, str]], answer: Any, where: str, column: str) -> list[dict[str, str]]:
    """The prompt and then the answer, which may begin with the prompt again."""
    turns = _turns(answer, "assistant", where, column)
    again = bool(prompt and turns) and _role(turns[0]) != "assistant"
    conversation = turns if again else [*prompt, *turns]
    check_conversation(conversation, f"{where}, {column}")
    _check_same(prompt, conversation[: len(prompt)], where, ("prompt", column))
    return as_messages(conversation)


def _check_same(one: Sequence[Message], other: Sequence[Message], where: str, names: tuple[str, str]) -> None:
    """Raise UserError where two prompts part, naming the turn and what each says from there on."""
    for number, turns in enumerate(zip_longest(one, other), start=1):
        said = [(turn["role"], turn["content"]) if turn else ("", "") for turn in turns]
        if said[0] != said[1]:
            letters = enumerate(zip_longest(*(content for _, content in said)))
            at = max(0, next((place for place, (a, b) in letters if a != b), 0) - SHOWN_BEFORE)
            shown = [f"{role} {content[at:]!r:.60}" if role else "no such turn" for role, content in said]
            found = f"{names[0]} has {shown[0]}, {names[1]} has {shown[1]}"
            raise UserError(f"{where}, turn {number}: {found}; both answers must be to the same prompt")


def _turns(value: Any, role: str, where: str, column: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return as_messages(value, role)
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise UserError(f"{where}: {column} must be a string or a list of turns, found {value!r:.60}")
    return as_messages(value)


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _missing(row: Mapping[str, Any], where: str, needed: str) -> UserError:
    found = ", ".join(map(str, row)) or "none"
    return UserError(f"{where}: this stage needs the columns {needed}; the columns found are {found}")
