"""Does a higher upper clip keep entropy (Yu et al. 2025, DAPO, arXiv:2503.14476, section 3.1)?"""

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.overrides import override
from lm.sweep.sweep import Sweep

SEVERAL = ["--reason.objective.updates_per_rollout", "4", "--reason.optimizer.peak_lr", "2e-4"]
CLIP = {"0.2": None, "0.28": {"reason.objective.clip_high": 0.28}}

sweep = Sweep("clip_higher", override(base, SEVERAL), {"upper clip": CLIP}, seeds=(0, 1, 2, 3))
quick = Sweep(
    "clip_higher_quick", override(small, ["--reason.objective.updates_per_rollout", "2"]), {"upper clip": CLIP}
)
