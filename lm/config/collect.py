"""Config of a Collect stage, which samples and judges answers and writes them as training rows for later stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import (
    COMPLETION_LENGTH,
    ENDED,
    REWARD,
    VERIFIER_ARGUMENTS,
    ObjectiveConfig,
    max_new_tokens_knob,
    reward_seconds_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class Collect(ObjectiveConfig):
    """Sample answers, have them judged, and write rows that later stages read as source `collected:STAGE`; trains nothing."""

    judge: str = knob(
        "", "judge: stage of a reward model (NAME or RUN:NAME), or `people` (label page); empty: the verifier"
    )
    verifier: str = knob("", "verifier that judges the answers where judge is empty, or FILE:FUNCTION of your own")
    make: Literal["pairs", "best"] = knob(
        "pairs", "rows to write: preference pairs of any two answers to a prompt, or conversations with the best answer"
    )
    answers: int = knob(2, "answers sampled for each prompt", least=2, most=2**16)
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = knob(1.0, "sampling temperature", least=0.01, most=100)
    reward_seconds: float = reward_seconds_knob()

    data = "prompts"
    produces = "rows"
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS}
    reward_model_field = "judge"
    caption = "samples answers and has them judged; the model is not trained."
    charts = (REWARD, COMPLETION_LENGTH)
    small_charts = (ENDED,)

    def rows_per_update(self, batch_size: int) -> int:
        return batch_size  # prompts, since nothing is trained

    @property
    def completions_per_prompt(self) -> int:
        return self.answers

    @property
    def reward_model_names(self) -> tuple[str, ...]:
        return (self.judge,) if self.judge not in ("", "people") else ()

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        if not self.judge and not self.verifier:
            raise UserError(
                f"{where}.judge and {where}.verifier are empty; judge should be the stage of a reward model or people, or "
                "verifier a verifier"
            )
        if self.judge == "people" and self.make == "best":
            raise UserError(
                f"{where}.make is best and judge is people, who compare pairs of answers and give no scores: make should be pairs"
            )
