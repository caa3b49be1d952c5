"""Config of the GRPO family: groups of sampled completions, rewarded by a verifier."""

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
    VERIFIER_ARGUMENTS,
    MetricChart,
    ObjectiveConfig,
    Sign,
    check_environment,
    environment_knob,
    reward_seconds_knob,
)

if TYPE_CHECKING:
    from lm.config.stage import Stage


@takes_former_names
@dataclass(frozen=True)
class GRPO(ObjectiveConfig):
    verifier: str = knob(
        "answer", "verifier that gives the reward: answer, style, helpful, or FILE:FUNCTION of your own"
    )
    group_size: int = knob(8, "completions sampled for one prompt", least=2, most=2**16)
    max_new_tokens: int = knob(64, "longest completion; the prompt gets seq_len less this", least=1, most=2**26)
    temperature: float = knob(1.0, "sampling temperature, in the log-probabilities too", least=0.01, most=100)
    clip_low: float = knob(0.2, "lower clip of the ratio: 1 - clip_low", least=1e-4, most=1)
    clip_high: float = knob(0.2, "upper clip of the ratio: 1 + clip_high", least=1e-4, most=1e6)
    kl_coef: float = knob(
        0.0, "KL penalty coefficient (k3, to the model before this stage); 0 disables it", least=0, most=1000
    )
    aggregation: Literal["token", "sequence", "constant"] = knob(
        "token", "aggregation of token losses, as in DAPO, GRPO, Dr. GRPO"
    )
    scale_advantages: bool = knob(True, "divide advantages by the group's standard deviation")
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
    tis_clip: float = knob(
        0.0,
        "importance correction (TIS) of what sampler and trainer differ by, rounding too: tokens are weighed by how much "
        "likelier they are to the trainer, at most this; 2 is usual; 0: none",
        least=1e-3,
        most=1e6,
        special=0,
    )
    reward_seconds: float = reward_seconds_knob()
    environment: str = environment_knob()

    data = "prompts"
    functions: ClassVar = {"verifier": VERIFIER_ARGUMENTS, "environment": ""}
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

    def rows_per_update(self, batch_size: int) -> int:
        return batch_size * self.group_size // self.updates_per_rollout

    @property
    def completions_per_prompt(self) -> int:
        return self.group_size

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
        check_environment(f"{stage.name}.objective", self.environment, self.verifier)
        if stage.batch_size * self.group_size % self.updates_per_rollout:
            raise UserError(
                f"{stage.name}.objective.updates_per_rollout {self.updates_per_rollout} does not divide its "
                f"{stage.batch_size * self.group_size} completions"
            )
