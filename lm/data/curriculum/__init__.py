"""A generated curriculum: instructions, preferences, arithmetic and tasks of environments, each row a pure function of its index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm.data.curriculum.arithmetic import arithmetic_row
from lm.data.curriculum.chains import chain_row
from lm.data.curriculum.countdown import countdown_row
from lm.data.curriculum.drills import ROWS as DRILLS
from lm.data.curriculum.drills import drill_row
from lm.data.curriculum.instruct import instruct_row
from lm.data.curriculum.preferences import preference_row
from lm.data.curriculum.products import product_row
from lm.data.curriculum.short_answers import short_answer_row

LENGTH = 1 << 40  # number of rows, generated on demand

GENERATORS: dict[str, Callable[[int], dict[str, Any]]] = {
    "instruct": instruct_row,
    "arithmetic": arithmetic_row,
    "preferences": preference_row,
    "chains": chain_row,
    "short_answers": short_answer_row,
    "countdown": countdown_row,
    "products": product_row,
}

__all__ = [
    "DRILLS",
    "GENERATORS",
    "LENGTH",
    "arithmetic_row",
    "chain_row",
    "drill_row",
    "instruct_row",
    "preference_row",
    "short_answer_row",
]
