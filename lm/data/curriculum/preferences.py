"""`gen:preferences`: pairs of right answers of which one has the better style, as the verifier `style` judges it."""

from __future__ import annotations

from typing import Any

from lm.data.curriculum.draw import Draw
from lm.data.curriculum.style import CLOSERS, OPENERS, dress
from lm.data.curriculum.tasks import draw_task

STREAM = 2


def preference_row(index: int) -> dict[str, Any]:
    """Row `index`: `prompt`, `chosen` (opener, no hedge), `rejected` (bare, hedged, or both), `answer`, `key`.

    The prompts and keys are those of `gen:instruct`, greetings excepted; a pure function of the index.
    """
    draw = Draw(STREAM, index)
    family, task = draw_task(draw)
    while family == "greeting":
        family, task = draw_task(draw)
    fault = draw.below(3)
    opener = draw.choice(OPENERS) if fault == 0 else ""
    closer = draw.choice(CLOSERS) if fault != 1 else ""
    return {
        "prompt": task.prompt,
        "chosen": dress(task.core, draw.choice(OPENERS)),
        "rejected": dress(task.core, opener, closer),
        "answer": task.core,
        "key": task.key,
    }
