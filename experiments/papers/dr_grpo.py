"""Length bias of per-sequence normalisation, and of the division by the standard deviation (Liu et al. 2025)."""

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.sweep.sweep import Sweep

KIND = {
    "GRPO": {"reason.objective.aggregation": "sequence"},
    "no division by length": {"reason.objective.aggregation": "constant"},
    "no division by std": {"reason.objective.aggregation": "sequence", "reason.objective.scale_advantages": False},
    "Dr. GRPO": {"reason.objective.aggregation": "constant", "reason.objective.scale_advantages": False},
}

sweep = Sweep("dr_grpo", base, {"loss": KIND}, seeds=(0, 1, 2))
quick = Sweep("dr_grpo_quick", small, {"loss": {name: KIND[name] for name in ("GRPO", "Dr. GRPO")}})
