"""Config of KTO: answers labelled good or bad, against a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import MetricChart, ObjectiveConfig

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class KTO(ObjectiveConfig):
    loss: Literal["kto", "apo_zero_unpaired", "FILE:FUNCTION"] = knob(
        "kto", "row of the KTO table, or a function of your own"
    )
    beta: float = knob(
        0.1,
        "scale of the implicit reward; the larger, the closer the policy stays to the reference",
        least=1e-6,
        most=100,
    )
    desirable_weight: float = knob(1.0, "weight of answers that are desirable", least=0, most=1e6)
    undesirable_weight: float = knob(1.0, "weight of answers that are not", least=0, most=1e6)

    data = "labelled"
    learns_preferences = True
    functions: ClassVar = {"loss": "rewards, sign, baseline"}
    caption = "is trained on answers that are marked as good or bad."
    charts = (MetricChart("Implicit reward", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),)
    small_charts = (MetricChart("KL to the start", {"kl": ""}),)

    def check(self, stage: Stage, model: Model) -> None:
        if stage.batch_size < 2:
            raise UserError(
                f"{stage.name}.batch_size is {stage.batch_size}; KTO pairs each prompt with another answer of its batch: "
                "it should be at least 2"
            )
        if not self.desirable_weight + self.undesirable_weight:
            raise UserError(
                f"{stage.name}.objective has desirable_weight 0 and undesirable_weight 0: one of them should be above 0"
            )
