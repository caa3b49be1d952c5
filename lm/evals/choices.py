"""Metrics of given continuations: multiple choice, minimal pairs, and the next words of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.bad_rows import VALUE, BadRow, has_type, is_blank, missing_columns
from lm.data.chat import render
from lm.data.text_tokenizer import TextTokenizer
from lm.evals.continuations import Continuation, score_continuations
from lm.evals.rows import SHOWN, Measured, Subject, mean_of
from lm.experiment import Eval
from lm.model.transformer import Transformer

LAYOUTS = "query, choices and gold; context_options, continuation and gold; good and bad; or context and continuation"


@dataclass(frozen=True)
class Choices:
    """The continuations of a row, as tokens and as text, and the index of the right one."""

    prompt: str
    tokens: list[Continuation]
    texts: list[str]
    gold: int


def read_choices(row: Mapping[str, Any], where: str, item: Eval, tokenizer: TextTokenizer) -> Choices:
    """The choices of a row in one of LAYOUTS. Raises BadRow for a row that has none of them."""
    pairs, gold = _texts(row, where)
    if any(is_blank(said) for _, said in pairs):
        raise BadRow(f"{where}: a choice is empty", VALUE)
    encoded = [_encoded(item, tokenizer, context, said) for context, said in pairs]
    return Choices(pairs[gold][0], encoded, [said for _, said in pairs], gold)


def _texts(row: Mapping[str, Any], where: str) -> tuple[list[tuple[str, str]], int]:
    """(context, continuation) of each choice, and the index of the right one."""
    has = {name for name, value in row.items() if not is_blank(value)}
    if {"query", "choices", "gold"} <= has:
        pairs = [(_text(row, "query", where), one) for one in _listed(row, "choices", where)]
    elif {"context_options", "continuation", "gold"} <= has:
        pairs = [(one, _text(row, "continuation", where)) for one in _listed(row, "context_options", where)]
    elif {"good", "bad"} <= has:
        return [("", _text(row, "good", where)), ("", _text(row, "bad", where))], 0
    elif {"context", "continuation"} <= has:
        return [(_text(row, "context", where), _text(row, "continuation", where))], 0
    else:
        raise missing_columns(row, where, f"choices need the columns {LAYOUTS}")
    gold = row["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(pairs):
        raise BadRow(
            f"{where}: gold is {gold!r:.40}; it should be the index of the right one of {len(pairs)} choices", VALUE
        )
    return pairs, gold


def _listed(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    if not isinstance(row[name], list) or not row[name] or any(not isinstance(one, str) for one in row[name]):
        raise BadRow(f"{where}: {name} is {row[name]!r:.60}; it should be a list of texts", VALUE)
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if not has_type(row[name], str | float):
        raise BadRow(f"{where}: {name} is {row[name]!r:.60}; it should be a text", VALUE)
    return str(row[name])


def _encoded(item: Eval, tokenizer: TextTokenizer, context: str, said: str) -> Continuation:
    """A context and its continuation, joined by a space; as chat the context is a user's turn and the continuation begins the answer."""
    if item.asked_as == "chat" and context:
        turns = [{"role": "user", "content": context}]
        return Continuation(render(turns, tokenizer, generation_prompt=True).tokens, tokenizer.encode(said))
    start = [tokenizer.document_ids[0]]
    if not context:
        return Continuation(start, tokenizer.encode(said))
    context = context.rstrip()
    before, whole = tokenizer.encode(context), tokenizer.encode(f"{context} {said}")
    return Continuation([*start, *before], whole[len(before) :])


def choice_accuracy(item: Eval, subject: Subject[Transformer], found: list[Choices]) -> Measured:
    """Metric `choice_accuracy`: how often the right choice has the largest log-probability.

    Also `choice_accuracy_bytes`, of the log-probability a byte of the choice, and `chance`, of a random choice.
    """
    scores = score_continuations(subject.model, [one for choices in found for one in choices.tokens])
    places = np.cumsum([0, *(len(one.tokens) for one in found)])
    right, right_bytes, examples = [], [], []
    for one, start in zip(found, places, strict=False):
        logp = np.array([score.logp for score in scores[start : start + len(one.tokens)]])
        sizes = np.array([max(1, len(text.encode())) for text in one.texts])
        right.append(float(logp.argmax() == one.gold))
        right_bytes.append(float((logp / sizes).argmax() == one.gold))
        answer, expected = one.texts[int(logp.argmax())], one.texts[one.gold]
        examples.append({"prompt": one.prompt, "answer": answer, "expected": expected, "reward": right[-1]})
    chance = {"chance": float(np.mean([1 / len(one.tokens) for one in found]))}
    values = mean_of("choice_accuracy", right) | mean_of("choice_accuracy_bytes", right_bytes) | chance
    return Measured(values, len(found), examples[:SHOWN])


def continuation_accuracy(item: Eval, subject: Subject[Transformer], found: list[Choices]) -> Measured:
    """Metric `continuation_accuracy`: how often greedy decoding gives the continuation; `loss` is its nats per token."""
    asked = [one.tokens[one.gold] for one in found]
    scores = score_continuations(subject.model, asked)
    nats, tokens = -sum(one.logp for one in scores), sum(len(one.tokens) for one in asked)
    values = mean_of("continuation_accuracy", [float(one.greedy) for one in scores]) | {"loss": nats / tokens}
    return Measured(values, len(found))
