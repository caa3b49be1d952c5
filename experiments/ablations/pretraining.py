"""Ablation with named variants: the quickstart's pretraining, and the same with one component removed at a time."""

import dataclasses
from pathlib import Path

from lm.files import load
from lm.sweep.sweep import Sweep

quickstart = load(str(Path(__file__).parent.parent / "quickstart.py"))
pretraining = dataclasses.replace(
    quickstart, name="pretraining", stages=quickstart.stages[:1], evals=quickstart.evals[:1]
)

WITHOUT = {
    "baseline": None,
    "no QK-norm": {"model.qk_norm": False},
    "no z-loss": {"pretrain.objective.z_loss": 0.0},
    "tied head": {"model.tied_head": True},
    "AdamW": {"pretrain.optimizer.kind": "adamw"},
}

sweep = Sweep("pretraining", pretraining, {"without": WITHOUT}, seeds=(0, 1, 2), metric="docs")
