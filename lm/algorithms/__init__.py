"""Training algorithms, one file each: their table, and their pure steps `step(state, batch) -> (state, metrics)` side by side."""

from lm.algorithms import cpo, distill, dpo, grpo, kto, orpo, ppo, pretrain, reward_model, sft
from lm.algorithms.algorithm import Algorithm
from lm.algorithms.cpo import cpo_step as cpo_step
from lm.algorithms.distill import distill_step as distill_step
from lm.algorithms.dpo import preference_step as preference_step
from lm.algorithms.grpo import grpo_step as grpo_step
from lm.algorithms.kto import kto_step as kto_step
from lm.algorithms.orpo import orpo_step as orpo_step
from lm.algorithms.ppo import ppo_step as ppo_step
from lm.algorithms.pretrain import pretrain_step as pretrain_step
from lm.algorithms.reward_model import reward_step as reward_step
from lm.algorithms.sft import sft_step as sft_step
from lm.experiment import CPO, DPO, GRPO, KTO, ORPO, PPO, SFT, Distill, Pretrain, RewardModel, Stage

ALGORITHMS: dict[type, Algorithm] = {
    Pretrain: pretrain.ALGORITHM,
    SFT: sft.ALGORITHM,
    DPO: dpo.ALGORITHM,
    CPO: cpo.ALGORITHM,
    ORPO: orpo.ALGORITHM,
    KTO: kto.ALGORITHM,
    RewardModel: reward_model.ALGORITHM,
    PPO: ppo.ALGORITHM,
    GRPO: grpo.ALGORITHM,
    Distill: distill.ALGORITHM,
}
"""The algorithm of each class of configs."""


def algorithm_of(stage: Stage) -> Algorithm:
    """The algorithm of a stage that trains."""
    return ALGORITHMS[type(stage.objective)]
