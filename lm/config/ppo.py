"""Config of PPO: sampled answers scored by reward models or a verifier, with a critic."""

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
    KL_TO_START,
    LOG_RATIO,
    SAMPLING_WARNINGS,
    STALENESS,
    TIS_LEVEL,
    TIS_LOW,
    TIS_MODE,
    VERIFIER_ARGUMENTS,
    MetricChart,
    MetricWarning,
    ObjectiveConfig,
    check_sampler_correction,
    check_staleness,
    entropy_coef_knob,
    max_new_tokens_knob,
    max_staleness_knob,
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
        (), "reward models that score the answers, by stage: NAME, or RUN:NAME of another run; empty: the verifier"
    )
    ensemble: Literal["mean", "min"] = knob("mean", "combination of the scores of several reward models")
    verifier: str = knob(
        "", "verifier or FILE:FUNCTION of your own: the reward if reward_models is empty, else logged as judge"
    )
    critic: Literal["separate", "head"] = knob(
        "separate", "critic: a separate model, initialised from the first reward model, or a value head on the policy"
    )
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = temperature_knob()
    kl_coef: float = knob(
        0.05, "KL penalty coefficient (KL to the model before this stage); 0 disables it", least=0, most=1000
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k1", "estimator of the KL penalty")
    kl_target: float = knob(
        0.0, "adaptive KL: target of the mean KL per answer, in nats; 0: kl_coef is fixed", least=0, most=1000
    )
    kl_horizon: int = knob(10_000, "adaptive KL: number of answers over which kl_coef adapts", least=1, most=10**9)
    gamma: float = knob(1.0, "discount factor per token", least=0, most=1)
    lam: float = knob(0.95, "λ of generalised advantage estimation", least=0, most=1)
    whiten_rewards: bool = knob(False, "divide token rewards by their standard deviation over the rollout")
    missing_eos_penalty: float = knob(
        0.0, "penalty subtracted from the score of an answer cut off at max_new_tokens; 0: none", least=0, most=1e6
    )
    clip: float = knob(0.2, "clip range of the importance ratio: 1 ± clip", least=1e-4, most=1e6)
    entropy_coef: float = entropy_coef_knob()
    value_clip: float = knob(0.2, "clip range of the values: value at the rollout ± value_clip", least=1e-4, most=1e6)
    value_coef: float = knob(0.1, "weight of the value loss; 0: the critic is not trained", least=0, most=1000)
    value_after_end: bool = knob(
        False, "place the score one state after the last token, as in TRL; false: at the last token"
    )
    epochs: int = knob(4, "epochs over each rollout", least=1, most=2**16)
    minibatches: int = knob(1, "minibatches in an epoch; each is one optimizer update", least=1, most=2**16)
    reward_seconds: float = reward_seconds_knob()
    tis_clip: float = tis_clip_knob()
    tis_level: Literal["token", "sequence"] = knob(*TIS_LEVEL)
    tis_mode: Literal["truncate", "mask"] = knob(*TIS_MODE)
    tis_low: float = knob(*TIS_LOW, least=0, most=1)
    max_staleness: int = max_staleness_knob()

    data = "prompts"
    learns_preferences = True
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS}
    reward_model_field = "reward_models"
    caption = "is trained by reinforcement learning: sampled answers of a high reward become more likely."
    charts = (
        MetricChart("Reward", {"score": "score", "reward": "minus KL penalty"}, "Healthy: rises, then flattens out."),
        MetricChart("Judge", {"judge": "verifier"}, "Healthy: rises with the score.", percent=True),
        KL_TO_START,
        COMPLETION_LENGTH,
        ENTROPY,
    )
    small_charts = (
        ENDED,
        MetricChart("KL coefficient", {"kl_coef": ""}, "Fixed, or adapting to kl_target; healthy: settles."),
        MetricChart("Policy loss", {"policy_loss": ""}, "Clipped surrogate; healthy: small, without spikes."),
        MetricChart("Value loss", {"value_loss": ""}, "Error of the critic; healthy: falls, then stays flat."),
        MetricChart(
            "Explained variance", {"explained_variance": ""}, "Of the returns, by the critic; healthy: rises to 1."
        ),
        MetricChart("Ratios clipped", {"clip_frac": ""}, "Tokens beyond the clip range; healthy: few.", percent=True),
        MetricChart("Values clipped", {"value_clip_frac": ""}, "Values beyond value_clip; healthy: few.", percent=True),
        MetricChart("KL to the rollout", {"old_kl": ""}, "Policy against the one that sampled; healthy: close to 0."),
        STALENESS,
        LOG_RATIO,
    )
    metric_warnings: ClassVar = SAMPLING_WARNINGS | {
        "equal_rewards": MetricWarning(
            lambda line: line.get("score_range") == 0,
            "in the {steps} steps up to step {step} all answers had the same reward ({score:.3g}): the policy cannot tell better "
            "answers from worse. Prompts that the model sometimes gets right, a reward with more levels or a higher temperature help",
        )
    }

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.minibatches

    @property
    def staleness(self) -> int:
        return self.max_staleness

    @property
    def reward_model_names(self) -> tuple[str, ...]:
        return self.reward_models

    @property
    def updates_per_epoch(self) -> int:
        return self.minibatches

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        return 1 - self.clip, 1 + self.clip

    @property
    def corrects_sampler(self) -> bool:
        return self.tis_clip > 0

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        check_sampler_correction(where, self)
        check_staleness(stage)
        if not self.reward_models and not self.verifier:
            raise UserError(
                f"{where}.reward_models and verifier are empty; reward_models should name the stage of a reward model, or verifier "
                "a verifier"
            )
        if self.ensemble != "mean" and len(self.reward_models) < 2:
            raise UserError(
                f"{where}.ensemble is {self.ensemble} and reward_models is {self.reward_models}; reward_models should be two or "
                "more, or ensemble mean"
            )
        if self.kl_target and not self.kl_coef:
            raise UserError(
                f"{where}.kl_target is {self.kl_target:g} and kl_coef is 0, which is adapted by factors and stays 0; kl_coef "
                "should be above 0, or kl_target 0"
            )
        if self.kl_horizon != type(self).kl_horizon and not self.kl_target:
            raise UserError(
                f"{where}.kl_horizon is {self.kl_horizon} and kl_target is 0, so kl_coef is fixed; kl_target should be above 0, or "
                f"kl_horizon {type(self).kl_horizon}"
            )
        if stage.batch_size % self.minibatches:
            raise UserError(
                f"{stage.name}.objective.minibatches is {self.minibatches}; it should divide {stage.name}.batch_size {stage.batch_size}"
            )
