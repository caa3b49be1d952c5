"""Rules against GRPO field combinations that make no sense; each error names both fields and what would work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lm.config.field import UserError
from lm.config.objective import ReadWith, check_read_with, check_sampler_correction

if TYPE_CHECKING:
    from lm.config.grpo import GRPO
    from lm.config.stage import Stage

READ_WITH: ReadWith = {
    "clip_low": ("surrogate", ("clipped", "gmpo")),
    "clip_high": ("surrogate", ("clipped", "gmpo", "cispo")),
    "delta": ("surrogate", ("clipped",)),
    "ratio_level": ("surrogate", ("clipped", "cispo", "sapo")),
    "sapo_tau_pos": ("surrogate", ("sapo",)),
    "sapo_tau_neg": ("surrogate", ("sapo",)),
    "vespo_k_pos": ("surrogate", ("vespo",)),
    "vespo_lambda_pos": ("surrogate", ("vespo",)),
    "vespo_k_neg": ("surrogate", ("vespo",)),
    "vespo_lambda_neg": ("surrogate", ("vespo",)),
}

CONFLICTS: tuple[tuple[Callable[[GRPO], Any], str], ...] = (
    (
        lambda o: o.surrogate == "cispo" and o.clip_high < 1,
        "surrogate is cispo and clip_high is {o.clip_high:g}; CISPO's clip_high is the upper bound of the ratio itself: it should "
        "be at least 1, for instance 5",
    ),
    (
        lambda o: o.delta and o.delta <= 1 + o.clip_high,
        "delta is {o.delta:g} and clip_high is {o.clip_high:g}; delta should be above 1 + clip_high, or 0 for no two-sided clip",
    ),
    (
        lambda o: o.baseline == "leave_one_out" and o.advantage_scale != "none",
        "baseline is leave_one_out and advantage_scale is {o.advantage_scale}; RLOO does not divide by a standard deviation: "
        "advantage_scale should be none, or baseline group",
    ),
    (
        lambda o: o.group_size == 1 and o.baseline != "none",
        "group_size is 1 and baseline is {o.baseline}; a group of one has no other completion to compare with: group_size should "
        "be at least 2, or baseline none",
    ),
    (
        lambda o: o.baseline == "none" and o.advantage_scale == "group",
        "baseline is none and advantage_scale is group; the standard deviation of a group makes no sense without the group's "
        "baseline: advantage_scale should be batch or none, or baseline group",
    ),
    (
        lambda o: o.group_size == 1 and o.rollouts > 1,
        "group_size is 1 and rollouts is {o.rollouts}; a group of one never has unequal rewards: group_size should be at least "
        "2, or rollouts 1",
    ),
    (
        lambda o: o.tis_clip and o.ratio_level != "token" and o.tis_level == "token",
        "ratio_level is {o.ratio_level} and tis_level is token; a sequence-level ratio needs a sequence-level importance "
        "correction: tis_level should be sequence, or ratio_level token",
    ),
    (
        lambda o: o.tis_clip and o.surrogate == "vespo" and o.tis_level == "sequence",
        "surrogate is vespo and tis_level is sequence; VESPO itself multiplies the token corrections: tis_level should be token",
    ),
    (
        lambda o: o.kl_coef and o.kl_in == "loss" and o.kl_estimator == "k1",
        "kl_estimator is k1 and kl_in is loss; the gradient of k1 in the loss is 0 on average: kl_estimator should be k2 or k3, "
        "or kl_in reward",
    ),
    (
        lambda o: o.kl_correction and not o.kl_coef,
        "kl_correction is true and kl_coef is 0; there is no KL to multiply by the ratio: kl_coef should be above 0, or "
        "kl_correction false",
    ),
    (
        lambda o: o.kl_correction and o.kl_in == "reward",
        "kl_correction is true and kl_in is reward; only a KL in the loss can be multiplied by the ratio: kl_correction should "
        "be false, or kl_in loss",
    ),
    (
        lambda o: o.reward_combination == "decoupled" and len(o.combined_rewards) < 2,
        "reward_combination is decoupled and verifiers is {o.verifiers}, reward_models {o.reward_models}; GDPO normalises several "
        "rewards one by one: these should be two or more, or reward_combination sum",
    ),
    (
        lambda o: o.reward_combination == "decoupled" and o.advantage_scale == "none",
        "reward_combination is decoupled and advantage_scale is none; without a standard deviation to divide by, "
        "decoupled equals sum: advantage_scale should be group or batch, or reward_combination sum",
    ),
    (
        lambda o: o.verifiers and o.verifier != "answer",
        "verifier is {o.verifier} and verifiers is {o.verifiers}, which replace it; verifier should be answer, and verifiers "
        "should include it or be empty",
    ),
    (
        lambda o: o.reward_combination == "decoupled" and o.kl_coef and o.kl_in == "reward",
        "reward_combination is decoupled and kl_in is reward; there is no single reward to subtract the KL from: kl_in should be "
        "loss, or reward_combination sum",
    ),
    (
        lambda o: o.reward_combination == "decoupled" and o.reward_clip,
        "reward_combination is decoupled and reward_clip is {o.reward_clip}; there is no single reward to clip: reward_clip should be "
        "empty, or reward_combination sum",
    ),
    (
        lambda o: o.reward_weights and len(o.reward_weights) != len(o.combined_rewards),
        "reward_weights is {o.reward_weights} and verifiers is {o.verifiers}, reward_models {o.reward_models}; reward_weights should "
        "be empty, or have one number for each of the rewards {o.combined_rewards}",
    ),
    (
        lambda o: o.reward_weights and not any(o.reward_weights),
        "reward_weights is {o.reward_weights}; at least one should be above 0",
    ),
    (
        lambda o: len(set(o.verifiers)) < len(o.verifiers),
        "verifiers is {o.verifiers}; it should have each verifier only once",
    ),
    (
        lambda o: len(set(o.reward_models)) < len(o.reward_models),
        "reward_models is {o.reward_models}; it should have each reward model only once",
    ),
    (
        lambda o: not (o.verifier_names or o.reward_models or o.environment),
        "verifier, reward_models and environment are empty; one of them should give the rewards",
    ),
    (
        lambda o: o.environment and o.reward_models,
        "environment is {o.environment} and reward_models is {o.reward_models}; an environment gives its own rewards: one of the "
        "two should be empty",
    ),
    (
        lambda o: o.reward_clip and (len(o.reward_clip) != 2 or o.reward_clip[0] >= o.reward_clip[1]),
        "reward_clip is {o.reward_clip}; it should be two numbers, the lower and the upper bound, or empty",
    ),
)


def check_grpo(o: GRPO, stage: Stage) -> None:
    """Raise UserError for the first field combination that makes no sense."""
    where = f"{stage.name}.objective"
    check_read_with(where, o, READ_WITH)
    for applies, text in CONFLICTS:
        if applies(o):
            raise UserError(f"{where}.{text.format(o=o)}")
    check_sampler_correction(where, o)
    if o.top_entropy < 1 and stage.microbatches > 1:
        raise UserError(
            f"{where}.top_entropy is {o.top_entropy:g} and {stage.name}.microbatches is {stage.microbatches}; the entropy threshold "
            "is a quantile over the whole batch: microbatches should be 1, or top_entropy 1"
        )
