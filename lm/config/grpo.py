"""Config of the GRPO family: groups of sampled completions, rewarded by a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.former import takes_former_names
from lm.config.grpo_rules import check_grpo
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
    check_environment,
    entropy_coef_knob,
    environment_knob,
    max_new_tokens_knob,
    reward_seconds_knob,
    temperature_knob,
    tis_clip_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


@takes_former_names
@dataclass(frozen=True)
class GRPO(ObjectiveConfig):
    verifier: str = knob(
        "answer", "verifier that gives the reward: answer, style, helpful, or FILE:FUNCTION of your own"
    )
    verifiers: tuple[str, ...] = knob(
        (), "several verifiers in the place of `verifier`, whose rewards are added; each is logged by its name"
    )
    reward_weights: tuple[float, ...] = knob(
        (), "weight of the reward of each of `verifiers`; empty: 1 each", least=0, most=1e6
    )
    reward_combination: Literal["sum", "decoupled"] = knob(
        "sum", "several rewards are added, then normalised; or normalised one by one, then added (GDPO)"
    )
    reward_clip: tuple[float, ...] = knob((), "least and largest reward, as -1,1; empty: any", least=-1e9, most=1e9)
    group_size: int = knob(8, "completions sampled for one prompt", least=1, most=2**16)
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = temperature_knob()
    baseline: Literal["group", "leave_one_out", "none"] = knob(
        "group", "subtracted from a reward: mean of the group, of its other completions (RLOO), nothing"
    )
    advantage_scale: Literal["group", "batch", "none"] = knob(
        "group",
        "advantages are divided by the rewards' standard deviation over the group, over the batch, or not",
    )
    whiten_advantages: bool = knob(
        False, "advantages have mean 0 and standard deviation 1 over the rollout (REINFORCE++, GDPO)"
    )
    drop_truncated: bool = knob(False, "completions without their end are not trained on (DAPO's overlong filtering)")
    ratio_level: Literal["token", "sequence", "product"] = knob(
        "token", "importance ratio of a token: its own, its completion's geometric mean (GSPO), their product (RLOO)"
    )
    surrogate: Literal["clipped", "cispo", "sapo", "gmpo", "vespo"] = knob(
        "clipped", "surrogate objective: PPO's clip, or that of the named paper"
    )
    clip_low: float = knob(
        0.2, "lower clip of the ratio: 1 - clip_low (gmpo: exp(-clip_low)); cispo has none", least=1e-4, most=1
    )
    clip_high: float = knob(
        0.2,
        "upper clip of the ratio: 1 + clip_high (gmpo: exp(clip_high); cispo: clip_high itself, at least 1)",
        least=1e-4,
        most=1e6,
    )
    delta: float = knob(
        0.0,
        "surrogate clipped: largest ratio where the advantage is negative (two-sided clip), above 1 + clip_high; 0: any",
        least=1,
        most=1e6,
        special=0,
    )
    sapo_tau_pos: float = knob(1.0, "surrogate sapo: temperature of positive advantages", least=1e-3, most=1e3)
    sapo_tau_neg: float = knob(1.05, "surrogate sapo: temperature of negative advantages", least=1e-3, most=1e3)
    vespo_k_pos: float = knob(2.0, "surrogate vespo: power of the weight, positive advantages", least=0, most=100)
    vespo_lambda_pos: float = knob(
        3.0, "surrogate vespo: decay of the weight, positive advantages", least=1e-4, most=80
    )
    vespo_k_neg: float = knob(3.0, "surrogate vespo: power of the weight, negative advantages", least=0, most=100)
    vespo_lambda_neg: float = knob(
        2.0, "surrogate vespo: decay of the weight, negative advantages", least=1e-4, most=80
    )
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = knob(
        "token", "aggregation of token losses, as in DAPO, GRPO, LUSPO, Dr. GRPO"
    )
    top_entropy: float = knob(
        1.0, "share of the tokens, those of highest entropy, that the surrogate covers; 1: all", above=0, most=1
    )
    off_policy_kl: float = knob(
        0.0,
        "completions with a negative advantage are dropped where their mean KL (sampler to policy) is above this, in "
        "nats a token; 0: none",
        least=1e-6,
        most=1e6,
        special=0,
    )
    kl_coef: float = knob(
        0.0, "KL penalty coefficient (to the model before this stage); 0 disables it", least=0, most=1000
    )
    kl_in: Literal["loss", "reward"] = knob(
        "loss", "the KL penalty is added to the loss, token by token, or taken off a completion's reward (RLOO)"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "estimator of that KL")
    kl_correction: bool = knob(False, "the KL in the loss is weighed by the importance ratio (DeepSeek-V3.2)")
    entropy_coef: float = entropy_coef_knob()
    updates_per_rollout: int = knob(1, "optimizer updates that share one rollout", least=1, most=2**16)
    rollouts: int = knob(
        1,
        "most rollouts in a step, sampled until the batch is full of groups with unequal rewards (DAPO's dynamic sampling)",
        least=1,
        most=2**16,
    )
    sampler: Literal["same", "bfloat16", "int8", "int4"] = knob(
        "same", "weights of the sampler: the trained ones, or quantised as in an inference engine"
    )
    tis_clip: float = tis_clip_knob()
    tis_level: Literal["token", "sequence"] = knob(*TIS_LEVEL)
    tis_mode: Literal["truncate", "mask"] = knob(*TIS_MODE)
    tis_low: float = knob(*TIS_LOW, least=0, most=1)
    reward_seconds: float = reward_seconds_knob()
    environment: str = environment_knob()

    data = "prompts"
    takes_presets = True
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS, "verifiers": VERIFIER_ARGUMENTS, "environment": ""}
    caption = "is trained by reinforcement learning: sampled answers that the verifier rewards become more likely."
    charts = (MetricChart("Reward", {"reward": "mean of the rollouts"}, percent=True), COMPLETION_LENGTH, ENTROPY)
    small_charts = (
        MetricChart("All-equal groups", {"frac_zero_std": ""}, percent=True),
        ENDED,
        MetricChart("Rollouts a step", {"rollouts": ""}),
        MetricChart("KL of the sampler to the trainer", {"sampler_kl": ""}),
        MetricChart("KL to the start", {"kl": ""}),
    )
    signs: ClassVar = SAMPLING_SIGNS | {
        "equal_rewards": Sign(
            lambda line: line.get("frac_zero_std") == 1,
            "for {steps} steps up to step {step} the answers to each prompt had the same reward (mean {reward:.3g}): advantages "
            "are 0 and the policy does not change; prompts that the model gets right now and then, a reward with more levels, a higher "
            "temperature or a larger group_size help",
        )
    }

    @property
    def updates_per_step(self) -> int:
        return self.updates_per_rollout

    @property
    def completions_per_prompt(self) -> int:
        return self.group_size

    @property
    def verifier_names(self) -> tuple[str, ...]:
        return self.verifiers or super().verifier_names

    @property
    def environment_name(self) -> str:
        return self.environment

    @property
    def max_rollouts(self) -> int:
        return self.rollouts

    @property
    def samples_as_trained(self) -> bool:
        return self.sampler == "same"

    @property
    def corrects_sampler(self) -> bool:
        return self.tis_clip > 0 or not self.samples_as_trained

    def check(self, stage: Stage, model: Model) -> None:
        check_environment(f"{stage.name}.objective", self.environment, self.verifier_names)
        if stage.batch_size * self.group_size % self.updates_per_rollout:
            raise UserError(
                f"{stage.name}.objective.updates_per_rollout {self.updates_per_rollout} does not divide its "
                f"{stage.batch_size * self.group_size} completions"
            )
        check_grpo(self, stage)
