"""All objectives that a stage can have: their union, which validation reads, and a table by class name."""

from __future__ import annotations

import typing

from lm.config.collect import Collect
from lm.config.cpo import CPO
from lm.config.cross_entropy import SFT, Pretrain
from lm.config.distill import Distill
from lm.config.dpo import DPO
from lm.config.grpo import GRPO
from lm.config.kto import KTO
from lm.config.objective import ObjectiveConfig
from lm.config.orpo import ORPO
from lm.config.ppo import PPO
from lm.config.reward_model import RewardModel

Objective = Pretrain | SFT | DPO | CPO | ORPO | KTO | GRPO | RewardModel | PPO | Distill | Collect
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {kind.__name__: kind for kind in typing.get_args(Objective)}
