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
    MetricChart,
    ObjectiveConfig,
    ReadWith,
    check_privileged_prompt,
    check_read_with,
    max_new_tokens_knob,
    reward_seconds_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


NO_LEAST = -1e9
"""`Collect.least_score` that every answer reaches."""
CONVERSATIONS = ("best", "all")
READ_WITH: ReadWith = {
    "least_score": ("make", (*CONVERSATIONS, "prompts")),
    "hint": ("make", CONVERSATIONS),
    "most_answers": ("make", ("all",)),
    "least_pass": ("make", ("prompts",)),
    "most_pass": ("make", ("prompts",)),
    "most_copies": ("make", ("prompts",)),
}


@dataclass(frozen=True)
class Collect(ObjectiveConfig):
    """Sample answers, have them judged, and write rows that later stages read as source `collected:STAGE`; trains nothing."""

    judge: str = knob(
        "", "judge: stage of a reward model (NAME or RUN:NAME), or `people` (label page); empty: the verifier"
    )
    verifier: str = knob("", "verifier that judges the answers where judge is empty, or FILE:FUNCTION of your own")
    make: Literal["pairs", "best", "all", "prompts"] = knob(
        "pairs",
        "rows to write: preference pairs of any two answers to a prompt, conversations with the best answer, or with all different answers; or the prompts, chosen by their pass rate",
    )
    least_score: float = knob(
        NO_LEAST,
        "make best and all: score that an answer must reach to be written (rejection sampling); make prompts: to pass; -1e9: none",
        least=NO_LEAST,
        most=1e9,
    )
    most_answers: int = knob(
        0,
        "make all: maximum number of answers written for a prompt, the first different ones; 0: all",
        least=0,
        most=2**16,
    )
    least_pass: float = knob(
        0.0,
        "make prompts: least pass rate of a prompt, the fraction of its answers that reach least_score",
        least=0,
        most=1,
    )
    most_pass: float = knob(1.0, "make prompts: largest pass rate of a prompt", least=0, most=1)
    most_copies: int = knob(
        1,
        "make prompts: copies of a prompt with pass rate 0; at pass rate p this times 1 - p, rounded up, so a prompt that is always solved has none (Kimi k1.5)",
        least=1,
        most=1024,
    )
    hint: str = knob(
        "",
        "last turn of a second prompt for prompts whose answers all miss least_score, with {prompt} and columns of the row, as '{prompt} The answer is {final}.'; rows keep the first prompt (STaR); empty: none",
    )
    answers: int = knob(2, "answers sampled for each prompt", least=1, most=2**16)
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = knob(1.0, "sampling temperature", least=0.01, most=100)
    reward_seconds: float = reward_seconds_knob()

    data = "prompts"
    produces = "rows"
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS}
    reward_model_field = "judge"
    caption = "samples answers and has them judged; the model is not trained."
    charts = (
        REWARD,
        MetricChart(
            "Prompts with an answer that is kept",
            {"solved": "first prompt", "solved_with_hint": "with the hint"},
            "Some answer reaches least_score; the others write no row.",
            percent=True,
        ),
        COMPLETION_LENGTH,
    )
    small_charts = (ENDED,)

    def rows_per_update(self, batch_size: int) -> int:
        return batch_size  # prompts, since nothing is trained

    @property
    def completions_per_prompt(self) -> int:
        return self.answers

    @property
    def reward_model_names(self) -> tuple[str, ...]:
        return (self.judge,) if self.judge not in ("", "people") else ()

    @property
    def privileged_prompt(self) -> str:
        return self.hint

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        check_read_with(where, self, READ_WITH)
        check_privileged_prompt(f"{where}.hint", self.hint)
        if self.make == "pairs" and self.answers < 2:
            raise UserError(
                f"{where}.answers is {self.answers} and make is pairs; a pair needs two: answers should be at least 2, or make best or all"
            )
        if self.hint and self.least_score == NO_LEAST:
            raise UserError(
                f"{where}.hint is {self.hint!r} and least_score is {NO_LEAST:g}, which every answer reaches; least_score should be the "
                "score of a right answer, or hint empty"
            )
        if self.make == "prompts":
            _check_prompts(where, self)
        if not self.judge and not self.verifier:
            raise UserError(
                f"{where}.judge and {where}.verifier are empty; judge should be the stage of a reward model or people, or "
                "verifier a verifier"
            )
        if self.judge == "people" and self.make != "pairs":
            raise UserError(
                f"{where}.make is {self.make} and judge is people, who compare pairs of answers and give no scores: make should be pairs"
            )


def _check_prompts(where: str, o: Collect) -> None:
    if o.least_score == NO_LEAST:
        raise UserError(
            f"{where}.make is prompts and least_score is {NO_LEAST:g}, which every answer reaches; least_score should be the score of "
            "a right answer"
        )
    if o.least_pass > o.most_pass:
        raise UserError(
            f"{where}.least_pass is {o.least_pass:g} and most_pass {o.most_pass:g}; no pass rate is between them: least_pass should be at most "
            "most_pass"
        )
