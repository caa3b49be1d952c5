"""Config of distillation: a student learns the next-token distributions of a teacher, on its own samples or on answers of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import (
    COMPLETION_LENGTH,
    ENDED,
    LOG_RATIO,
    REWARD,
    SAMPLING_WARNINGS,
    STALENESS,
    VERIFIER_ARGUMENTS,
    MetricChart,
    ObjectiveConfig,
    check_privileged_prompt,
    check_staleness,
    max_new_tokens_knob,
    max_staleness_knob,
    reward_seconds_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


@dataclass(frozen=True)
class Distill(ObjectiveConfig):
    teacher: str = knob(
        "",
        "teacher: an earlier stage NAME, RUN:NAME of another run, or open weights hf:FOLDER or gguf:FILE, with the same tokenizer; empty: the model before this stage",
    )
    teacher_prompt: str = knob(
        "",
        "last turn of the prompt as the teacher alone reads it: a text with {prompt} and columns of the row, as '{prompt} The answer is {final}.'; empty: the same prompt",
    )
    on_policy: float = knob(
        1.0,
        "fraction of steps that train on completions sampled by the student (GKD's lambda); the others train on the answers of the data",
        least=0,
        most=1,
    )
    beta: float = knob(
        0.5,
        "generalised Jensen-Shannon divergence: 0: forward KL(teacher ‖ student), 1: reverse KL(student ‖ teacher)",
        least=0,
        most=1,
    )
    divergence_temperature: float = knob(
        1.0, "temperature of both distributions in the divergence", least=0.01, most=100
    )
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = knob(1.0, "sampling temperature of the student", least=0.01, most=100)
    verifier: str = knob("", "verifier or FILE:FUNCTION of your own whose reward of the samples is logged; empty: none")
    reward_seconds: float = reward_seconds_knob()
    max_staleness: int = max_staleness_knob()

    tis_clip: ClassVar = 0.0  # no ratios
    data = "prompts"
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS}
    caption = "is distilled: its next-token distributions become those of the teacher."
    charts = (
        MetricChart("Same most likely token", {"teacher_agreement": ""}, "As the teacher; healthy: rises.", True),
        REWARD,
        COMPLETION_LENGTH,
        MetricChart(
            "Entropy",
            {"entropy": "student", "teacher_entropy": "teacher"},
            "Nats per token; healthy: the curves approach each other.",
        ),
    )
    small_charts = (ENDED, STALENESS, LOG_RATIO)
    metric_warnings: ClassVar = SAMPLING_WARNINGS

    @property
    def staleness(self) -> int:
        return self.max_staleness

    @property
    def teacher_name(self) -> str:
        return self.teacher

    @property
    def privileged_prompt(self) -> str:
        return self.teacher_prompt

    @property
    def has_ratios(self) -> bool:
        return False

    @property
    def reads_answers(self) -> bool:
        return self.on_policy < 1

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        if not self.teacher and not self.teacher_prompt:
            raise UserError(
                f"{where}.teacher is empty and teacher_prompt is empty: the model itself with the same prompt teaches nothing; teacher "
                "should be a stage, a run or open weights, or teacher_prompt have a column that the student does not read"
            )
        check_staleness(stage)
        check_privileged_prompt(f"{where}.teacher_prompt", self.teacher_prompt)
        unread = [
            name
            for name in ("verifier", "temperature", "max_staleness")
            if getattr(self, name) != getattr(type(self), name)
        ]
        if not self.on_policy and unread:
            raise UserError(
                f"{where}.{unread[0]} is {getattr(self, unread[0])} and on_policy is 0, which samples nothing: on_policy should be above "
                f"0, or {unread[0]} {getattr(type(self), unread[0])!r}"
            )
