"""Learning-rate sensitivity with and without QK-norm (Wortsman et al. 2023, arXiv:2309.14322)."""

from tiny_text import experiment as base

from lm.sweep.sweep import Sweep

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
NORM = {"QK-norm": None, "no QK-norm": {"model.qk_norm": False}}

sweep = Sweep("qk_norm", base, {"norm": NORM, "pretrain.optimizer.peak_lr": RATES}, seeds=(0, 1, 2))
