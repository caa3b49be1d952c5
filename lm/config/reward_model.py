"""Config of the training of a reward model on preference pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import CHOSEN_REJECTED, PAIR_CHARTS, MetricChart, ObjectiveConfig, check_read_with

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class RewardModel(ObjectiveConfig):
    """Bradley-Terry reward model on preference pairs: a scalar head replaces the language-model head."""

    margins: bool = knob(False, "train the score difference of a pair to exceed the pair's `margin` column")
    center_coef: float = knob(
        0.0, "weight of the squared sum of a pair's scores, which centres them at 0; 0 disables it", least=0, most=1000
    )
    ties: Literal["drop", "split", "rao_kupper"] = knob(
        "drop", "pairs with a `tie`: left out, counted as half a win for each answer, or a third outcome"
    )
    tie_width: float = knob(0.5, "ties rao_kupper: score difference below which a tie is likely", least=1e-3, most=1000)
    layers: int = knob(0, "number of layers, the first ones of the language model; 0: all layers", least=0, most=2**14)

    data = "pairs"
    produces = "scorer"
    caption = "trains a reward model, which gives preferred answers the higher score."
    charts = (
        PAIR_CHARTS[0],
        MetricChart("Score", CHOSEN_REJECTED, "Mean scores of the answers; healthy: the curves separate."),
        PAIR_CHARTS[2],
    )

    @property
    def data_options(self) -> dict[str, Any]:
        return {"ties": self.ties != "drop", "margins": self.margins}

    def trained_model(self, model: Model) -> Model:
        # No language-model head, and only the first `layers` layers.
        return dataclasses.replace(model, num_layers=self.layers or model.num_layers, tied_head=True)

    def check(self, stage: Stage, model: Model) -> None:
        check_read_with(f"{stage.name}.objective", self, {"tie_width": ("ties", ("rao_kupper",))})
        if self.layers > model.num_layers:
            raise UserError(
                f"{stage.name}.objective.layers is {self.layers}; it should be from 0 to model.num_layers {model.num_layers}"
            )
