"""ChatML: conversations as ids and loss mask, in the format of the tokenizers that are trained here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lm.data import bad_rows
from lm.data.bad_rows import BadRow
from lm.data.text_tokenizer import LossOn, Message, Rendered, Tools

END_OF_TEXT, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


NO_TOOLS = "the chat format of lm has none; leave such conversations out"
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class Codec(Protocol):
    """The part of a tokenizer that the renderer uses."""

    @property
    def special_ids(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]: ...


def render_chatml(
    messages: Sequence[Message],
    tokenizer: Codec,
    generation_prompt: bool = False,
    loss_on: LossOn = "answers",
    learn_end: bool = True,
    tools: Tools = None,
) -> Rendered:
    """Render messages in ChatML: `<|im_start|>ROLE\\nCONTENT<|im_end|>\\n` each, then optionally the assistant's header.

    The text between two special tokens is encoded as one string. The loss mask covers an assistant's content and
    its `<|im_end|>` (`loss_on` all: every token of every turn); without `learn_end` no `<|im_end|>`, and nothing of a turn with
    `train` False. A token that straddles header and content is covered. Does not validate the messages.
    """
    _check_plain(messages, tools)
    start, end = tokenizer.special_ids[TURN_START], tokenizer.special_ids[TURN_END]
    newline = tokenizer.encode("\n")
    tokens: list[int] = []
    mask: list[int] = []
    last_turn = 0
    for message in messages:
        header, content = message["role"] + "\n", message["content"]
        learnt = message.get("train", True)
        last_turn = len(tokens)
        if learnt and loss_on == "answers" and message["role"] == "assistant":
            ids, starts = tokenizer.encode_offsets(header + content)
            ends = [*starts[1:], len(header) + len(content)]
            inside = [int(s >= len(header) or e > len(header)) for s, e in zip(starts, ends, strict=True)]
            mask += [0, *inside, int(learn_end), *([0] * len(newline))]
        else:
            ids = tokenizer.encode(header + content)
            all_of_it = int(learnt and loss_on == "all")
            mask += [all_of_it] * (1 + len(ids)) + [all_of_it and int(learn_end)] + [all_of_it] * len(newline)
        tokens += [start, *ids, end, *newline]
    if generation_prompt:
        last_turn = len(tokens)
        header_ids = [start, *tokenizer.encode("assistant\n")]
        tokens += header_ids
        mask += [0] * len(header_ids)
    return Rendered(tokens, mask, last_turn)


def _check_plain(messages: Sequence[Message], tools: Tools) -> None:
    """Raise BadRow for tools, and for reasoning beside the content, which the format has no place for."""
    if tools:
        raise BadRow(f"the conversation has tools, and {NO_TOOLS}, or the column", bad_rows.TOOLS)
    for number, turn in enumerate(messages, start=1):
        called = next((key for key in TOOL_KEYS if turn.get(key)), "")
        if called or turn["role"] == "tool":
            raise BadRow(f"turn {number}: {called or 'role tool'} is of a tool, and {NO_TOOLS}", bad_rows.TOOLS)
        if key := next((key for key in REASONING_KEYS if turn.get(key)), ""):
            raise BadRow(
                f"turn {number}: {key} is not trained on beside the content; put the reasoning into the content, or remove the key",
                bad_rows.REASONING,
            )
