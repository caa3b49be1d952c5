"""Training algorithms, one file each; their pure steps `step(state, batch) -> (state, metrics)` are exported here side by side."""

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
