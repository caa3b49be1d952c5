"""Configs of the objectives that maximise likelihood: pretraining on text, SFT on conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lm.config.field import knob
from lm.config.objective import ObjectiveConfig

SMOOTHING = (0.0, "label smoothing: share of the target that is spread over the vocabulary")


@dataclass(frozen=True)
class Pretrain(ObjectiveConfig):
    z_loss: float = knob(0.0, "weight of the squared log-normaliser", least=0, most=1000)
    label_smoothing: float = knob(*SMOOTHING, least=0, below=1)

    loss: ClassVar = "nll"
    data = "text"
    caption = "is trained on text, to predict the next token."


@dataclass(frozen=True)
class SFT(ObjectiveConfig):
    z_loss: float = knob(0.0, "weight of the squared log-normaliser", least=0, most=1000)
    loss_on: Literal["answers", "all"] = knob("answers", "tokens the loss covers: assistant turns only, or all")
    learn_end: bool = knob(True, "the loss also covers the token that ends a turn")
    loss: Literal["nll", "dft"] = knob("nll", "cross-entropy, or the same weighed by the token's probability (DFT)")
    label_smoothing: float = knob(*SMOOTHING, least=0, below=1)

    data = "conversations"
    caption = "is trained on conversations, to answer."

    @property
    def data_options(self) -> dict[str, Any]:
        return {"loss_on": self.loss_on, "learn_end": self.learn_end}
