"""Configs of the cross-entropy objectives: pretraining on text and SFT on conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lm.config.field import knob
from lm.config.objective import ObjectiveConfig

SMOOTHING = (0.0, "label smoothing: fraction of the target probability spread over the vocabulary; 0 disables it")
Z_LOSS = (0.0, "z-loss coefficient: weight of the squared log-normaliser of the softmax; 0 disables it")


@dataclass(frozen=True)
class Pretrain(ObjectiveConfig):
    z_loss: float = knob(*Z_LOSS, least=0, most=1000)
    label_smoothing: float = knob(*SMOOTHING, least=0, below=1)

    loss: ClassVar = "nll"
    data = "text"
    caption = "is trained on text to predict the next token."


@dataclass(frozen=True)
class SFT(ObjectiveConfig):
    z_loss: float = knob(*Z_LOSS, least=0, most=1000)
    loss_on: Literal["answers", "all"] = knob("answers", "tokens the loss covers: assistant turns only, or all")
    learn_end: bool = knob(True, "the loss also covers the end-of-turn token")
    loss: Literal["nll", "dft"] = knob(
        "nll", "cross-entropy (nll), or cross-entropy weighted by the token's probability (dft, dynamic fine-tuning)"
    )
    label_smoothing: float = knob(*SMOOTHING, least=0, below=1)

    data = "conversations"
    caption = "is trained on conversations to produce the assistant's answers."

    @property
    def data_options(self) -> dict[str, Any]:
        return {"loss_on": self.loss_on, "learn_end": self.learn_end}
