"""Config of ORPO: preference pairs, cross-entropy plus an odds-ratio loss, without a reference model."""

from __future__ import annotations

from dataclasses import dataclass

from lm.config.field import knob
from lm.config.objective import PAIR_CHARTS, ObjectiveConfig


@dataclass(frozen=True)
class ORPO(ObjectiveConfig):
    beta: float = knob(0.1, "weight of the odds-ratio loss, which is added to the cross-entropy", least=0, most=1000)

    data = "pairs"
    learns_preferences = True
    caption = "is trained on pairs of answers to prefer the chosen one."
    charts = PAIR_CHARTS
