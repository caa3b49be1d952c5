"""Muon against AdamW at the same tuning budget (Jordan et al. 2024)."""

from tiny_text import experiment as base

from lm.sweep.sweep import Sweep

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
RULES = ("adamw", "muon")

sweep = Sweep(
    "muon",
    base,
    {"pretrain.optimizer.kind": RULES, "pretrain.optimizer.peak_lr": RATES},
    seeds=(0, 1, 2, 3),
)
