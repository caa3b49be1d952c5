"""`gen:products`: products of two numbers of two digits, which a small model computes with a calculator, not in its head.

Eighteen of a hundred demonstrations call the tool `calc` (`lm/rollout/environments/tools.py`) and repeat its result; the others give a number of
about the right size, which is almost never right.
"""

from __future__ import annotations

from typing import Any

from lm.data.curriculum.draw import Draw

STREAM = 7
CALLED_PERCENT = 18


def product_row(index: int) -> dict[str, Any]:
    """Row `index`: `question`, `answer`, `messages` (a demonstration), `key`; a pure function of the index.

    The key is the same for the factors in any order.
    """
    draw = Draw(STREAM, index)
    a, b = draw.between(11, 99), draw.between(11, 99)
    question, answer = f"What is {a} * {b}?", str(a * b)
    guess = f"The answer is {a * b + draw.between(-100, 100)}."
    turns = [guess]
    if draw.below(100) < CALLED_PERCENT:
        turns = [f"<tool>calc: {a} * {b}</tool>", answer, f"The answer is {answer}."]
    roles = ("assistant", "user") * len(turns)
    messages = [{"role": "user", "content": question}]
    messages += [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"question": question, "answer": answer, "messages": messages, "key": f"{min(a, b)} * {max(a, b)}"}
