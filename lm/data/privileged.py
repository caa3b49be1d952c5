"""Privileged prompts, which a teacher reads or a hint adds, and the answers that the data has to prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lm.config.objective import COLUMN, PROMPT
from lm.data import bad_rows, chat
from lm.data.bad_rows import BadRow
from lm.data.prompts import MessagesOf, render_prompt
from lm.data.text_tokenizer import TextTokenizer


def context_columns(template: str) -> list[str]:
    """The columns of a row that a privileged prompt reads."""
    return [name for name in COLUMN.findall(template) if name != PROMPT]


def context_messages(messages: MessagesOf, template: str, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The prompt of a row with the template, filled in, as its last turn; {prompt} is the text of that turn.

    Raises:
        BadRow: the row lacks a column.
    """
    bad_rows.check_columns(row, context_columns(template), where, repr(template))
    *before, last = messages(row, where)
    text = COLUMN.sub(lambda found: str(last["content"] if found[1] == PROMPT else row[found[1]]), template)
    return [*before, {**last, "content": text}]


def with_answers(messages: MessagesOf, answer: Callable[[Mapping[str, Any], str], list[int]]) -> MessagesOf:
    """The same prompts, after a check that the row has an answer."""

    def checked(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        answer(row, where)
        return messages(row, where)

    return checked


def answer_tokens(messages: MessagesOf, tokenizer: TextTokenizer, row: Mapping[str, Any], where: str) -> list[int]:
    """The tokens of the answer that a row has to its prompt, up to and including the end token.

    Raises:
        BadRow: the row has no answer, or the chat template renders it differently from a completion of the prompt.
    """
    prompt = render_prompt(messages, row, tokenizer, where).tokens
    said = chat.training_messages(row, where)
    told = row if tokenizer.has_template else {}
    whole = chat.render(
        said, tokenizer, where=where, tools=chat.tools_of(told, where), variables=chat.variables_of(told, where)
    )
    end = len(whole.mask) - whole.mask[::-1].index(1) if any(whole.mask) else 0
    if whole.tokens[: len(prompt)] != prompt or end <= len(prompt):
        raise BadRow(
            f"{where}: the chat template does not render the answer as a completion of the prompt", bad_rows.TEMPLATE
        )
    return whole.tokens[len(prompt) : end]
