"""Config of PPO: sampled answers, scored by reward models or a verifier, with a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.former import takes_former_names
from lm.config.model import Model
from lm.config.objective import (
    COMPLETION_LENGTH,
    ENDED,
    ENTROPY,
    SAMPLING_SIGNS,
    TIS_LEVEL,
    TIS_LOW,
    TIS_MODE,
    VERIFIER_ARGUMENTS,
    MetricChart,
    ObjectiveConfig,
    Sign,
    check_sampler_correction,
    entropy_coef_knob,
    max_new_tokens_knob,
    reward_seconds_knob,
    temperature_knob,
    tis_clip_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


@takes_former_names
@dataclass(frozen=True)
class PPO(ObjectiveConfig):
    reward_models: tuple[str, ...] = knob(
        (), "stages whose models score the answers, as NAME, or RUN:NAME of another run; empty: the verifier does"
    )
    ensemble: Literal["mean", "min"] = knob("mean", "how the scores of several reward models are combined")
    verifier: str = knob(
        "",
        "verifier, or FILE:FUNCTION of your own: the reward where no reward model is named, else only logged; empty: none",
    )
    critic: Literal["separate", "head"] = knob(
        "separate", "critic: a separate model (from the first reward model, or this one), or a value head on the policy"
    )
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = temperature_knob()
    kl_coef: float = knob(
        0.05,
        "KL penalty coefficient, in the token rewards (to the model before this stage); 0 disables it",
        least=0,
        most=1000,
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k1", "estimator of that KL")
    kl_target: float = knob(
        0.0,
        "target of the mean KL per answer in nats, which kl_coef adapts to; 0: kl_coef is fixed",
        least=0,
        most=1000,
    )
    kl_horizon: int = knob(10_000, "answers over which kl_coef adapts", least=1, most=10**9)
    gamma: float = knob(1.0, "discount of a token", least=0, most=1)
    lam: float = knob(0.95, "λ of generalised advantage estimation", least=0, most=1)
    whiten_rewards: bool = knob(False, "divide rewards by their standard deviation over the rollout")
    missing_eos_penalty: float = knob(
        0.0, "taken off the score of an answer that did not end by itself", least=0, most=1e6
    )
    clip: float = knob(0.2, "ratios are clipped to 1 ± clip", least=1e-4, most=1e6)
    entropy_coef: float = entropy_coef_knob()
    value_clip: float = knob(0.2, "values are clipped to the rollout's ± value_clip", least=1e-4, most=1e6)
    value_coef: float = knob(0.1, "weight of the value loss", least=0, most=1000)
    value_after_end: bool = knob(
        False,
        "the score is given one state after the last token, whose value is learnt too, as in TRL; else at the token",
    )
    epochs: int = knob(4, "epochs over each rollout", least=1, most=2**16)
    minibatches: int = knob(1, "minibatches in an epoch, an optimizer update each", least=1, most=2**16)
    reward_seconds: float = reward_seconds_knob()
    tis_clip: float = tis_clip_knob()
    tis_level: Literal["token", "sequence"] = knob(*TIS_LEVEL)
    tis_mode: Literal["truncate", "mask"] = knob(*TIS_MODE)
    tis_low: float = knob(*TIS_LOW, least=0, most=1)

    data = "prompts"
    learns_preferences = True
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS}
    reward_model_field = "reward_models"
    caption = "is trained by reinforcement learning: sampled answers of a high reward become more likely."
    charts = (
        MetricChart("Reward", {"score": "score", "reward": "score less the KL penalty"}),
        MetricChart("Judge", {"judge": "mean of the rollouts"}, percent=True),
        MetricChart("KL to the start", {"kl": "nats an answer"}),
        COMPLETION_LENGTH,
        ENTROPY,
    )
    small_charts = (
        ENDED,
        MetricChart("KL coefficient", {"kl_coef": ""}),
        MetricChart("Policy's loss", {"policy_loss": ""}),
        MetricChart("Values' loss", {"value_loss": ""}),
        MetricChart("Variance explained", {"explained_variance": ""}),
        MetricChart("Ratios clipped", {"clip_frac": ""}, percent=True),
        MetricChart("Values clipped", {"value_clip_frac": ""}, percent=True),
        MetricChart("KL to the rollout", {"old_kl": ""}),
    )
    signs: ClassVar = SAMPLING_SIGNS | {
        "equal_rewards": Sign(
            lambda line: line.get("score_range") == 0,
            "for {steps} steps up to step {step} all answers had the same reward ({score:.3g}): nothing tells better answers from "
            "worse; prompts that the model gets right now and then, a reward with more levels or a higher temperature help",
        )
    }

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.minibatches

    @property
    def reward_model_names(self) -> tuple[str, ...]:
        return self.reward_models

    @property
    def updates_per_epoch(self) -> int:
        return self.minibatches

    @property
    def corrects_sampler(self) -> bool:
        return self.tis_clip > 0

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        check_sampler_correction(where, self)
        if not self.reward_models and not self.verifier:
            raise UserError(
                f"{where} has neither reward_models nor a verifier: name a reward model's stage, or a row of "
                "the verifier table"
            )
        if self.ensemble != "mean" and len(self.reward_models) < 2:
            raise UserError(
                f"{where}.ensemble is {self.ensemble} and reward_models is {self.reward_models}; reward_models should be two or "
                "more, or ensemble mean"
            )
        if self.kl_target and not self.kl_coef:
            raise UserError(
                f"{where}.kl_target is {self.kl_target:g} and kl_coef is 0, which adapts by factors and stays 0; kl_coef should "
                "be above 0, or kl_target 0"
            )
        if self.kl_horizon != type(self).kl_horizon and not self.kl_target:
            raise UserError(
                f"{where}.kl_horizon is {self.kl_horizon} and kl_target is 0, which adapts nothing; kl_target should be above 0, or "
                f"kl_horizon {type(self).kl_horizon}"
            )
        if stage.batch_size % self.minibatches:
            raise UserError(
                f"{stage.name}.objective.minibatches {self.minibatches} does not divide its {stage.batch_size} answers"
            )
