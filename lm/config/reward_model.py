"""Config of a reward model's training on pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import PAIR_CHARTS, MetricChart, ObjectiveConfig, check_read_with

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class RewardModel(ObjectiveConfig):
    """Bradley-Terry reward model on pairs: a scalar head replaces the language-model head."""

    margins: bool = knob(False, "require the scores of a pair to differ by its `margin`")
    center_coef: float = knob(
        0.0, "weight of the squared sum of a pair's two scores, which keeps their mean at 0", least=0, most=1000
    )
    ties: Literal["drop", "split", "rao_kupper"] = knob(
        "drop", "pairs that are a `tie`: left out, half each, a third outcome"
    )
    tie_width: float = knob(
        0.5, "rao_kupper: answers whose scores differ by less are called equal", least=1e-3, most=1000
    )
    layers: int = knob(
        0,
        "layers of the reward model, the first of the language model; 0: all",
        least=0,
        most=2**14,
    )

    data = "pairs"
    produces = "scorer"
    caption = "is a reward model, which gives preferred answers the higher score."
    charts = (
        PAIR_CHARTS[0],
        MetricChart("Score", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),
        PAIR_CHARTS[2],
    )

    @property
    def data_options(self) -> dict[str, Any]:
        return {"ties": self.ties != "drop", "margins": self.margins}

    def trained_model(self, model: Model) -> Model:
        # Without a head for tokens, and maybe without the later layers.
        return dataclasses.replace(model, num_layers=self.layers or model.num_layers, tied_head=True)

    def check(self, stage: Stage, model: Model) -> None:
        check_read_with(f"{stage.name}.objective", self, {"tie_width": ("ties", ("rao_kupper",))})
        if self.layers > model.num_layers:
            raise UserError(
                f"{stage.name}.objective.layers is {self.layers}; it should be from 0 to model.num_layers {model.num_layers}"
            )
