"""Presets of the GRPO family: a table of published algorithms as configs, with paper and equation; `presets.dapo` is one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lm.config.field import UserError, nearest
from lm.config.grpo import GRPO


@dataclass(frozen=True)
class Preset:
    """A published algorithm as a GRPO config; `equation` is the maximised objective, with ratio `r` and advantage `A`."""

    paper: str
    equation: str
    config: GRPO

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields that differ from their defaults."""
        return {f.name: value for f in dataclasses.fields(GRPO) if (value := getattr(self.config, f.name)) != f.default}


PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        "DeepSeekMath, arXiv:2402.03300, eq. 3; numbers of section 4.2",
        "A = (R - mean) / std of the group; 1/|o| Σ min(r·A, clip(r, 1-ε, 1+ε)·A) - β·k3",
        GRPO(aggregation="sequence", kl_coef=0.04),
    ),
    "dr_grpo": Preset(
        "Dr. GRPO, arXiv:2503.20783, section 3.2",
        "A = R - mean of the group; 1/max_new_tokens Σ min(r·A, clip(r, 1-ε, 1+ε)·A)",
        GRPO(aggregation="constant", advantage_scale="none"),
    ),
    "dapo": Preset(
        "DAPO, arXiv:2503.14476, eq. 8; numbers of section 4.1",
        "as grpo without KL; clip to (1-0.2, 1+0.28), mean over all tokens, dynamic sampling until groups have unequal rewards, "
        "truncated completions dropped",
        GRPO(clip_high=0.28, rollouts=4, drop_truncated=True),
    ),
    "gspo": Preset(
        "GSPO, arXiv:2507.18071, eq. 5 to 7; numbers of section 5.1",
        "s = (π(o) / π_old(o))^(1/|o|); min(s·A, clip(s, 1-ε, 1+ε)·A)",
        GRPO(ratio_level="sequence", aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
    ),
    "rloo": Preset(
        "RLOO, arXiv:2402.14740",
        "A = R - β·KL - mean of the group's other completions; min(r·A, clip(r, 1-ε, 1+ε)·A) with r = π(o) / π_old(o); the KL is of the "
        "whole completion (β and the clip as in TRL, the paper has no ratio)",
        GRPO(
            baseline="leave_one_out",
            advantage_scale="none",
            ratio_level="product",
            aggregation="sequence",
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
        ),
    ),
    "reinforce_pp": Preset(
        "REINFORCE++, arXiv:2501.03262",
        "A = R - β·KL, whitened over the rollout, one completion per prompt; min(r·A, clip(r, 1-ε, 1+ε)·A); the KL is of the whole "
        "completion, the same for all of its tokens, where the paper adds that of the tokens from each on",
        GRPO(
            group_size=1,
            baseline="none",
            advantage_scale="none",
            whiten_advantages=True,
            kl_coef=0.01,
            kl_in="reward",
            kl_estimator="k1",
        ),
    ),
    "reinforce_pp_baseline": Preset(
        "REINFORCE++-baseline, arXiv:2501.03262",
        "A = R - mean of the group, whitened over the rollout; min(r·A, clip(r, 1-ε, 1+ε)·A) - β·k2",
        GRPO(advantage_scale="none", whiten_advantages=True, kl_coef=0.01, kl_estimator="k2"),
    ),
    "cispo": Preset(
        "CISPO, arXiv:2506.13585, eq. 4 and 5; clip_high of arXiv:2510.13786",
        "sg[min(r, clip_high)]·A·log π, mean over all tokens",
        GRPO(surrogate="cispo", clip_high=5.0),
    ),
    "sapo": Preset(
        "SAPO, arXiv:2511.20347, eq. 5 and 6",
        "1/|o| Σ 4/τ·σ(τ·(r - 1))·A, τ = 1 where A > 0, else 1.05",
        GRPO(surrogate="sapo", aggregation="sequence"),
    ),
    "gmpo": Preset(
        "GMPO, arXiv:2507.20673",
        "(Π clip(r, e^-0.4, e^0.4))^(1/|o|)·A",
        GRPO(surrogate="gmpo", aggregation="sequence", clip_low=0.4, clip_high=0.4),
    ),
    "luspo": Preset(
        "LUSPO, arXiv:2602.05261; numbers of section 5.1",
        "|o|·min(s·A, clip(s, 1-ε, 1+ε)·A) with GSPO's s",
        GRPO(ratio_level="sequence", aggregation="sequence_sum", clip_low=2e-3, clip_high=2.5e-3),
    ),
    "vespo": Preset(
        "VESPO, arXiv:2602.10693, eq. 20",
        "sg[e^λ·w^k·e^(-λ·w)]·A·log π with w = π(o) / π_old(o), mean over all tokens",
        GRPO(surrogate="vespo"),
    ),
    "gdpo": Preset(
        "GDPO, arXiv:2601.05242",
        "A = Σ w·(R_k - mean) / std of the group, reward by reward, then whitened over the rollout",
        GRPO(
            verifiers=("answer", "style"),
            reward_combination="decoupled",
            whiten_advantages=True,
            aggregation="sequence",
        ),
    ),
    "two_sided": Preset(
        "INTELLECT-2, arXiv:2505.07291, section 3.4; numbers of section 4.1",
        "min(min(r, δ)·A, clip(r, 1-ε, 1+ε)·A) - β·k3 with δ = 4, which also bounds r where A < 0",
        GRPO(delta=4.0, kl_coef=0.001),
    ),
    "high_entropy": Preset(
        "Beyond the 80/20 rule, arXiv:2506.01939, section 5.2",
        "as dapo, over the 20 % of tokens with the highest entropy",
        GRPO(clip_high=0.28, rollouts=4, drop_truncated=True, top_entropy=0.2),
    ),
    "deepseek_v3_2": Preset(
        "DeepSeek-V3.2, arXiv:2512.02556, section 3.1, eq. 7 to 9",
        "as grpo with β·r·k3; completions with A < 0 and mean log π_old - log π > off_policy_kl are dropped; the paper gives "
        "neither number: β is DeepSeekMath's, off_policy_kl 0.05 is our choice (TRL proposes 0.5)",
        GRPO(aggregation="sequence", kl_coef=0.04, kl_correction=True, off_policy_kl=0.05),
    ),
    "tis": Preset(
        "TIS, Yao et al. 2025, fengyao.notion.site/off-policy-rl",
        "min(w, 2)·min(r·A, clip(r, 1-ε, 1+ε)·A) with w = π_old / π_sampler, where π_old is the policy before the step",
        GRPO(tis_clip=2.0),
    ),
    "icepop": Preset(
        "IcePop, arXiv:2510.18855",
        "w·min(r·A, clip(r, 1-ε, 1+ε)·A) with w = π_old / π_sampler; tokens with w outside [0.5, 5] are masked",
        GRPO(tis_clip=5.0, tis_mode="mask", tis_low=0.5),
    ),
    "decoupled": Preset(
        "AReaL, arXiv:2505.24298, eq. 5; the bound is its code's",
        "w·min(r·A, clip(r, 1-ε, 1+ε)·A) with r = π / π_old and w = π_old / π_sampler, where π_old is the policy before the step "
        "and π_sampler an older one (max_staleness); tokens with w above 5 are masked",
        GRPO(tis_clip=5.0, tis_mode="mask"),
    ),
}


KEPT = frozenset({"group_size", "verifiers", "reward_models"})
"""Fields that a preset leaves unchanged unless it sets them; every other field that any preset sets is reset to its default."""
CORRECTION = frozenset({"tis_clip", "tis_level", "tis_mode", "tis_low"})
"""Fields of the importance correction, which goes with any member of the family: a preset sets all of them or none."""


def apply_preset(o: Any, name: str, where: str) -> GRPO:
    """Apply the named preset to a GRPO config; its prompts, lengths, verifiers and sampler are kept.

    Raises:
        UserError: no such preset, or `o` is not a GRPO config; `where` is the field that names the preset.
    """
    if not o.takes_presets:
        raise UserError(f"{where} is {name!r}; presets are of GRPO, and this objective is {type(o).__name__}")
    if name not in PRESETS:
        raise UserError(f"{where} is {name!r}{nearest(name, PRESETS)}; it should be one of {', '.join(PRESETS)}")
    own = PRESETS[name].fields
    touched = {field for preset in PRESETS.values() for field in preset.fields} - KEPT - CORRECTION
    touched |= CORRECTION if CORRECTION & own.keys() else frozenset()
    fields = {field: getattr(PRESETS[name].config, field) for field in touched} | own
    return dataclasses.replace(o, **fields | ({"verifiers": o.verifiers} if o.verifiers else {}))


def __getattr__(name: str) -> GRPO:
    """`presets.dapo`: the config of that name."""
    if name not in PRESETS:
        raise AttributeError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name].config
