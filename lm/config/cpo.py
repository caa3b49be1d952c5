"""Config of the CPO family: preference pairs, without a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import knob
from lm.config.model import Model
from lm.config.objective import PAIR_CHARTS, ObjectiveConfig, check_label_smoothing, check_read_with

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class CPO(ObjectiveConfig):
    """CPO, SimPO (loss simpo, nll_coef 0), CPO-SimPO (loss simpo) and AlphaPO (loss simpo, alpha not 0)."""

    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "FILE:FUNCTION"] = knob(
        "sigmoid", "loss of the CPO family, or FILE:FUNCTION of your own"
    )
    beta: float = knob(
        0.1, "scale of the rewards; use 2 or more with simpo, whose rewards are means over tokens", least=1e-6, most=100
    )
    label_smoothing: float = knob(
        0.0, "losses sigmoid and simpo: assumed fraction of flipped preferences; 0 disables it", least=0, below=0.5
    )
    gamma: float = knob(
        0.5, "loss simpo: target margin between chosen and rejected reward (scaled by beta)", least=0, most=1000
    )
    alpha: float = knob(
        0.0, "loss simpo: AlphaPO's alpha, the shape of the reward; 0: the log-probability (SimPO)", least=-10, most=10
    )
    nll_coef: float = knob(1.0, "weight of the cross-entropy of the chosen answers; 0 disables it", least=0, most=1000)

    data = "pairs"
    learns_preferences = True
    functions: ClassVar = {"loss": "margin, knobs"}
    caption = "is trained on pairs of answers to prefer the chosen one."
    charts = PAIR_CHARTS

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        check_label_smoothing(where, self.label_smoothing, (self.loss,), frozenset({"sigmoid", "simpo"}))
        check_read_with(where, self, {"alpha": ("loss", ("simpo",)), "gamma": ("loss", ("simpo",))})
