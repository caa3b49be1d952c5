"""Config of KTO: single answers labelled good or bad, with a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import IMPLICIT_REWARD, KL_TO_START, ObjectiveConfig

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class KTO(ObjectiveConfig):
    loss: Literal["kto", "apo_zero_unpaired", "FILE:FUNCTION"] = knob(
        "kto", "loss of the KTO family, or FILE:FUNCTION of your own"
    )
    beta: float = knob(
        0.1, "scale of the implicit reward; larger keeps the policy closer to the reference", least=1e-6, most=100
    )
    desirable_weight: float = knob(1.0, "weight of answers labelled good", least=0, most=1e6)
    undesirable_weight: float = knob(1.0, "weight of answers labelled bad", least=0, most=1e6)

    data = "labelled"
    learns_preferences = True
    functions: ClassVar = {"loss": "rewards, sign, baseline"}
    caption = "is trained on single answers labelled good or bad."
    charts = (IMPLICIT_REWARD,)
    small_charts = (KL_TO_START,)

    def check(self, stage: Stage, model: Model) -> None:
        if stage.batch_size < 2:
            raise UserError(
                f"{stage.name}.batch_size is {stage.batch_size}; it should be at least 2, since KTO estimates its KL from each "
                "prompt with another prompt's answer"
            )
        if not self.desirable_weight + self.undesirable_weight:
            raise UserError(
                f"{stage.name}.objective.desirable_weight and undesirable_weight are both 0; one of them should be above 0"
            )
