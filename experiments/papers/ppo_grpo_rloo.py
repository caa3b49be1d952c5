"""Do PPO, GRPO and RLOO end alike from the same model with the same number of answers (Ahmadian et al. 2024)?"""

import dataclasses

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.experiment import PPO, Experiment
from lm.sweep.sweep import Sweep


def ppo(e: Experiment) -> Experiment:
    """As many answers a step as GRPO's groups together, and one update of them; values from a head on the policy."""
    *before, stage = e.stages
    answers = stage.batch_size * stage.objective.group_size
    objective = PPO(
        verifier="answer",
        critic="head",
        max_new_tokens=stage.objective.max_new_tokens,
        kl_coef=0.0,
        epochs=1,
        minibatches=1,
    )
    return dataclasses.replace(e, stages=(*before, dataclasses.replace(stage, objective=objective, batch_size=answers)))


RULE = {
    "GRPO": None,
    # The mean of the others as baseline is the mean of all times G / (G - 1): RLOO up to that factor.
    "RLOO": {"reason.objective.aggregation": "constant", "reason.objective.scale_advantages": False},
    "PPO": ppo,
}

sweep = Sweep("ppo_grpo_rloo", base, {"rule": RULE}, seeds=(0, 1, 2, 3))
quick = Sweep("ppo_grpo_rloo_quick", small, {"rule": RULE})
