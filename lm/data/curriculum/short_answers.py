"""`gen:short_answers`: facts and sums of one-digit numbers, each asked with the request for an answer that a verifier finds.

The problems are for reinforcement learning of an open model, which answers some of them, in words of its own, and rarely marks
its answer.
"""

from __future__ import annotations

from typing import Any

from lm.data.curriculum.draw import Draw
from lm.data.curriculum.tasks import capital, opposite, plural, small_sum

STREAM = 6
FAMILIES = (capital, opposite, plural, small_sum)
REQUEST = 'End your reply with "The answer is" and the answer.'


def short_answer_row(index: int) -> dict[str, Any]:
    """Row `index`: `question`, `answer`, `messages` (a demonstration), `key`; a pure function of the index.

    The key is the same for every wording, so that a held-out problem is new in any words.
    """
    draw = Draw(STREAM, index)
    prompt, answer, key = draw.choice(FAMILIES)(draw)
    question = f"{prompt} {REQUEST}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"The answer is {answer}."}]
    return {"question": question, "answer": answer, "messages": messages, "key": key.rpartition(":")[0]}
