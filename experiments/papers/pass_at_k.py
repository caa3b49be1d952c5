"""Does reinforcement learning solve what sampling k times did not (Yue et al. 2025, arXiv:2504.13837)?"""

import dataclasses

from small_reasoner import CHAINS
from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.experiment import Eval
from lm.sweep.sweep import Sweep

SAMPLES = Eval("samples", CHAINS, "pass_at_k", count=128, max_new_tokens=64, temperature=1.0, best_of=64)

sweep = Sweep("pass_at_k", dataclasses.replace(base, evals=(*base.evals, SAMPLES)), seeds=(0, 1, 2))
quick = Sweep(
    "pass_at_k_quick",
    dataclasses.replace(
        small,
        evals=(
            *small.evals,
            dataclasses.replace(SAMPLES, count=8, best_of=4),
        ),
    ),
)
