"""Config of the CPO family: pairs of answers without a reference."""

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
    """Pairs without a reference: CPO, SimPO (`simpo`, nll_coef 0), CPO-SimPO, AlphaPO (`simpo` with an alpha)."""

    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "FILE:FUNCTION"] = knob(
        "sigmoid", "loss of the CPO family, or a function of your own"
    )
    beta: float = knob(
        0.1, "scale of the rewards; 2 and more for simpo, whose rewards are a token's mean", least=1e-6, most=100
    )
    label_smoothing: float = knob(
        0.0, "label smoothing: assumed fraction of flipped preferences; sigmoid and simpo", least=0, below=0.5
    )
    gamma: float = knob(
        0.5, "simpo: target margin between the rewards of chosen and rejected answer, after beta", least=0, most=1000
    )
    alpha: float = knob(0.0, "AlphaPO: shape of simpo's reward; 0: the log-probability", least=-10, most=10)
    nll_coef: float = knob(1.0, "weight of cross-entropy on the chosen answers", least=0, most=1000)

    data = "pairs"
    learns_preferences = True
    functions: ClassVar = {"loss": "margin, knobs"}
    caption = "is trained on pairs of answers, to prefer the chosen one."
    charts = PAIR_CHARTS

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        check_label_smoothing(where, self.label_smoothing, (self.loss,), frozenset({"sigmoid", "simpo"}))
        check_read_with(where, self, {"alpha": ("loss", ("simpo",)), "gamma": ("loss", ("simpo",))})
