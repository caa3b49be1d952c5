"""Config of a stage that trains nothing and writes rows for later stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import (
    COMPLETION_LENGTH,
    ENDED,
    VERIFIER_ARGUMENTS,
    MetricChart,
    ObjectiveConfig,
    max_new_tokens_knob,
    reward_seconds_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class Collect(ObjectiveConfig):
    """Trains nothing: samples answers, has them judged, and writes the rows that later stages read as the source `collected:STAGE`."""

    judge: str = knob(
        "", "stage of a reward model, as NAME or RUN:NAME; or `people`, on the label page; empty: the verifier"
    )
    verifier: str = knob("", "verifier (or FILE:FUNCTION of your own) that judges where judge is empty")
    make: Literal["pairs", "best"] = knob(
        "pairs", "preference pairs of every two answers, or conversations with the best one"
    )
    answers: int = knob(2, "sampled for each prompt", least=2, most=2**16)
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = knob(1.0, "sampling temperature", least=0.01, most=100)
    reward_seconds: float = reward_seconds_knob()

    data = "prompts"
    produces = "rows"
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS}
    reward_model_field = "judge"
    caption = "samples answers and has them judged; the model stays the same."
    charts = (MetricChart("Reward", {"reward": "mean of the rollouts"}, percent=True), COMPLETION_LENGTH)
    small_charts = (ENDED,)

    def rows_per_update(self, batch_size: int) -> int:
        return batch_size  # nothing is trained: prompts

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
                f"{where} has no judge: set judge to a reward model's stage or to people, or name a verifier"
            )
        if self.judge == "people" and self.make == "best":
            raise UserError(
                f"{where}.make is best and judge people, who compare answers and give no numbers: make pairs"
            )
