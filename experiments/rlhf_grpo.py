"""RLHF with GRPO in place of PPO: groups of answers, scored by the reward model of `rlhf`; there is no critic.

The judge of `rlhf`, a program, scores held-out answers, which shows when the policy overoptimises the reward model.

    lm run rlhf_grpo
    lm run rlhf_grpo --grpo.objective.preset rloo      # or another of `lm config --presets`
"""

import dataclasses

from rlhf import experiment as rlhf

from lm.experiment import GRPO

ppo = next(stage for stage in rlhf.stages if stage.name == "ppo")
grpo = dataclasses.replace(
    ppo,
    name="grpo",
    objective=GRPO(
        verifier="", reward_models=("reward",), group_size=4, max_new_tokens=48, kl_coef=0.02, updates_per_rollout=4
    ),
    batch_size=16,
)
before = rlhf.stages[: rlhf.stages.index(ppo)]
experiment = dataclasses.replace(rlhf, name="rlhf_grpo", stages=(*before, grpo))
