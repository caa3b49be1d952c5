"""`gen:instruct`: short questions with right answers, plain or with an opener or a hedge or both."""

from __future__ import annotations

from typing import Any

from lm.data.curriculum.draw import Draw
from lm.data.curriculum.style import CLOSERS, OPENERS, dress
from lm.data.curriculum.tasks import draw_task

STREAM = 1


def instruct_row(index: int) -> dict[str, Any]:
    """Row `index`: `messages` (user, assistant), `answer` (the core) and `key`; a pure function of the index.

    Greetings are answered plainly.
    """
    draw = Draw(STREAM, index)
    family, task = draw_task(draw)
    answer = task.core if family == "greeting" else random_dress(draw, task.core)
    messages = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "answer": task.core, "key": task.key}


def random_dress(draw: Draw, core: str) -> str:
    """The answer with an opener half of the time and, independently, a closer a third of the time.

    Openers are frequent, so that the model answers with them as accurately as without, and the preference stage costs no
    accuracy.
    """
    opener = draw.choice(OPENERS) if draw.below(2) else ""
    closer = draw.choice(CLOSERS) if draw.below(3) == 0 else ""
    return dress(core, opener, closer)
