"""A generated curriculum: instructions, preferences and arithmetic, each row a pure function of its index."""

from __future__ import annotations

from lm.data.curriculum.arithmetic import arithmetic_row
from lm.data.curriculum.chains import chain_row
from lm.data.curriculum.drills import ROWS as DRILLS
from lm.data.curriculum.drills import drill_row
from lm.data.curriculum.instruct import instruct_row
from lm.data.curriculum.preferences import preference_row
from lm.data.curriculum.short_answers import short_answer_row

LENGTH = 1 << 40  # number of rows, generated on demand

__all__ = [
    "DRILLS",
    "LENGTH",
    "arithmetic_row",
    "chain_row",
    "drill_row",
    "instruct_row",
    "preference_row",
    "short_answer_row",
]
