"""`gen:chains`: sums of two to six digits, which a model of some hundred thousand parameters learns within a minute.

Two fifths of the demonstrations add one digit after another, the others give the sum directly, independent of the
problem; adding in steps is right more often. The task is small and quick enough to repeat whole training runs
with many seeds.
"""

from __future__ import annotations

from typing import Any

from lm.data.curriculum.arithmetic import WORKED_PERCENT, chain
from lm.data.curriculum.draw import Draw

STREAM = 5
DIGITS = (2, 6)  # fewest and most of a sum
WORDINGS = ("What is {}?", "How much is {}?", "Calculate {}", "Add these digits: {}")


def chain_row(index: int) -> dict[str, Any]:
    """Row `index`: `question`, `answer`, `messages` (a demonstration), `key`; a pure function of the index.

    The key is the same for the digits in any order.
    """
    draw = Draw(STREAM, index)
    digits = [draw.between(1, 9) for _ in range(draw.between(*DIGITS))]
    question = draw.choice(WORDINGS).format(" + ".join(map(str, digits)))
    answer = str(sum(digits))
    steps = ", ".join(chain(digits[0], *(("+", digit) for digit in digits[1:])))
    shown = f"The answer is {answer}."
    if draw.below(100) < WORKED_PERCENT:
        shown = f"{steps}. {shown}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": shown}]
    return {"question": question, "answer": answer, "messages": messages, "key": "+".join(map(str, sorted(digits)))}
