"""Config of the GRPO family: groups of completions sampled for each prompt and scored by a verifier."""

from __future__ import annotations

import math
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
    KL_TO_START,
    LOG_RATIO,
    REWARD,
    SAMPLING_WARNINGS,
    STALENESS,
    TIS_LEVEL,
    TIS_LOW,
    TIS_MODE,
    VERIFIER_ARGUMENTS,
    MetricChart,
    MetricWarning,
    ObjectiveConfig,
    check_environment,
    check_staleness,
    entropy_coef_knob,
    environment_knob,
    max_new_tokens_knob,
    max_staleness_knob,
    max_turns_knob,
    reward_seconds_knob,
    temperature_knob,
    tis_clip_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


OTHER_REWARDS = ("reward_std", "reward_timeouts")  # metrics that are no verifier's reward


@takes_former_names
@dataclass(frozen=True)
class GRPO(ObjectiveConfig):
    verifier: str = knob(
        "answer",
        "verifier that gives the reward: answer, exact, choice, regex:PATTERN, json_schema, format, language:CODE, overlong:LOW-HIGH, "
        "python_tests, endpoint:FILE, style, helpful, or FILE:FUNCTION of your own",
    )
    verifiers: tuple[str, ...] = knob(
        (), "several verifiers, which replace `verifier`; each is logged as metric reward_NAME; empty: `verifier` alone"
    )
    reward_models: tuple[str, ...] = knob(
        (),
        "reward models, each a reward beside those of the verifiers (verifier empty: without any), by stage: NAME, or RUN:NAME of another run",
    )
    reward_weights: tuple[float, ...] = knob(
        (), "weight of each of `verifiers`, then of each of `reward_models`; empty: 1 each", least=0, most=1e6
    )
    reward_combination: Literal["sum", "decoupled"] = knob(
        "sum", "several rewards are summed, then normalised; or normalised one by one, then summed (GDPO)"
    )
    reward_clip: tuple[float, ...] = knob(
        (), "bounds that the reward is clipped to, as -1,1; empty: none", least=-1e9, most=1e9
    )
    group_size: int = knob(8, "completions sampled for each prompt", least=1, most=2**16)
    max_new_tokens: int = max_new_tokens_knob()
    temperature: float = temperature_knob()
    baseline: Literal["group", "leave_one_out", "none"] = knob(
        "group", "baseline subtracted from a reward: mean of the group, mean of the group's others (RLOO), or none"
    )
    advantage_scale: Literal["group", "batch", "none"] = knob(
        "group", "divide advantages by the rewards' standard deviation over the group or the batch, or not at all"
    )
    whiten_advantages: bool = knob(
        False, "normalise advantages to mean 0 and standard deviation 1 over the rollout (REINFORCE++, GDPO)"
    )
    drop_truncated: bool = knob(
        False, "do not train on completions cut off at max_new_tokens (DAPO's overlong filtering)"
    )
    ratio_level: Literal["token", "sequence", "product"] = knob(
        "token", "importance ratio: per token, or its geometric mean (GSPO) or product (RLOO) over the completion"
    )
    surrogate: Literal["clipped", "cispo", "sapo", "gmpo", "vespo"] = knob(
        "clipped", "surrogate objective: PPO's clip (clipped), or that of CISPO, SAPO, GMPO or VESPO"
    )
    clip_low: float = knob(
        0.2, "lower bound of the ratio: 1 - clip_low (gmpo: exp(-clip_low); cispo: none)", least=1e-4, most=1
    )
    clip_high: float = knob(
        0.2, "upper bound of the ratio: 1 + clip_high (gmpo: exp(clip_high); cispo: clip_high)", least=1e-4, most=1e6
    )
    delta: float = knob(
        0.0, "two-sided clip: upper bound of the ratio for negative advantages; 0: none", least=1, most=1e6, special=0
    )
    sapo_tau_pos: float = knob(1.0, "surrogate sapo: temperature τ for positive advantages", least=1e-3, most=1e3)
    sapo_tau_neg: float = knob(1.05, "surrogate sapo: temperature τ for negative advantages", least=1e-3, most=1e3)
    vespo_k_pos: float = knob(2.0, "surrogate vespo: exponent k for positive advantages", least=0, most=100)
    vespo_lambda_pos: float = knob(3.0, "surrogate vespo: decay rate λ for positive advantages", least=1e-4, most=80)
    vespo_k_neg: float = knob(3.0, "surrogate vespo: exponent k for negative advantages", least=0, most=100)
    vespo_lambda_neg: float = knob(2.0, "surrogate vespo: decay rate λ for negative advantages", least=1e-4, most=80)
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = knob(
        "token",
        "token losses are averaged over all tokens (DAPO), averaged (sequence, GRPO) or summed (sequence_sum, LUSPO) per completion, or divided by max_new_tokens (constant, Dr. GRPO)",
    )
    top_entropy: float = knob(
        1.0, "train only on this fraction of tokens, those with the highest entropy; 1: all tokens", above=0, most=1
    )
    off_policy_kl: float = knob(
        0.0,
        "drop completions with negative advantage and mean KL above this, in nats per token; 0: none",
        least=1e-6,
        most=1e6,
        special=0,
    )
    kl_coef: float = knob(
        0.0, "KL penalty coefficient (KL to the model before this stage); 0 disables it", least=0, most=1000
    )
    kl_in: Literal["loss", "reward"] = knob(
        "loss", "add the KL penalty to the loss of each token, or subtract it from the completion's reward (RLOO)"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "estimator of the KL penalty")
    kl_correction: bool = knob(False, "multiply the KL in the loss by the importance ratio (DeepSeek-V3.2)")
    entropy_coef: float = entropy_coef_knob()
    updates_per_rollout: int = knob(1, "optimizer updates per rollout; 1: fully on-policy", least=1, most=2**16)
    rollouts: int = knob(
        1, "dynamic sampling (DAPO): maximum rollouts per step to find groups with unequal rewards", least=1, most=2**16
    )
    sampler: Literal["same", "bfloat16", "int8", "int4"] = knob(
        "same", "weights of the sampler: the trained weights, or a copy quantised as in an inference engine"
    )
    cache: Literal["same", "int8"] = knob(
        "same",
        "keys and values in the sampler's cache: as computed, or int8 with a scale for each head of each token, in half of bfloat16's memory",
    )
    tis_clip: float = tis_clip_knob()
    tis_level: Literal["token", "sequence"] = knob(*TIS_LEVEL)
    tis_mode: Literal["truncate", "mask"] = knob(*TIS_MODE)
    tis_low: float = knob(*TIS_LOW, least=0, most=1)
    reward_seconds: float = reward_seconds_knob()
    environment: str = environment_knob()
    max_turns: int = max_turns_knob()
    max_staleness: int = max_staleness_knob()

    data = "prompts"
    takes_presets = True
    reward_model_field = "reward_models"
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS, "verifiers": VERIFIER_ARGUMENTS, "environment": ""}
    caption = "is trained by reinforcement learning: sampled answers that the verifier rewards become more likely."
    charts = (
        REWARD,
        MetricChart("Rewards by verifier", {"reward_*": ""}, "Healthy: none falls.", True, OTHER_REWARDS),
        COMPLETION_LENGTH,
        ENTROPY,
    )
    small_charts = (
        MetricChart("Groups with equal rewards", {"frac_zero_std": ""}, "No gradient; healthy: few.", percent=True),
        ENDED,
        MetricChart("Rollouts per step", {"rollouts": ""}, "To fill the batch; healthy: steady."),
        MetricChart("KL from sampler to trainer", {"sampler_kl": ""}, "Their mismatch per token; healthy: close to 0."),
        KL_TO_START,
        STALENESS,
        LOG_RATIO,
    )
    metric_warnings: ClassVar = SAMPLING_WARNINGS | {
        "equal_rewards": MetricWarning(
            lambda line: line.get("frac_zero_std") == 1,
            "in the {steps} steps up to step {step} all answers to a prompt had the same reward (mean {reward:.3g}): advantages are 0 "
            "and the policy does not change. Prompts that the model sometimes gets right, a reward with more levels, a higher "
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
    def reward_model_names(self) -> tuple[str, ...]:
        return self.reward_models

    @property
    def combined_rewards(self) -> tuple[str, ...]:
        """Names of the rewards that are combined into one; empty where a single verifier or an environment gives it."""
        several = self.verifiers or self.reward_models
        return self.verifier_names + self.reward_models if several else ()

    @property
    def environment_name(self) -> str:
        return self.environment

    @property
    def turn_limit(self) -> int:
        return self.max_turns

    @property
    def staleness(self) -> int:
        return self.max_staleness

    @property
    def max_rollouts(self) -> int:
        return self.rollouts

    @property
    def samples_as_trained(self) -> bool:
        return self.sampler == "same" and self.cache == "same"

    @property
    def sampler_cache(self) -> str:
        return self.cache

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        bounds = {
            "clipped": (1 - self.clip_low, 1 + self.clip_high),
            "gmpo": (math.exp(-self.clip_low), math.exp(self.clip_high)),
            "cispo": (0.0, self.clip_high),
        }
        return bounds.get(self.surrogate, super().ratio_bounds)

    @property
    def corrects_sampler(self) -> bool:
        return self.tis_clip > 0 or not self.samples_as_trained

    def check(self, stage: Stage, model: Model) -> None:
        check_environment(f"{stage.name}.objective", self.environment, self.verifier_names, self.max_turns)
        if stage.batch_size * self.group_size % self.updates_per_rollout:
            raise UserError(
                f"{stage.name}.objective.updates_per_rollout is {self.updates_per_rollout}; it should divide the "
                f"{stage.batch_size * self.group_size} completions of a rollout"
            )
        check_grpo(self, stage)
        check_staleness(stage)
