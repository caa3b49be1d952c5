"""Search over learning rate and clip of the quickstart's GRPO stage; the stages before it are trained once per seed."""

from pathlib import Path

from lm.files import load
from lm.sweep.sweep import TPE, LogUniform, Sweep

sweep = Sweep(
    "reason_rate",
    load(str(Path(__file__).parent.parent / "quickstart.py")),
    {"reason.optimizer.peak_lr": LogUniform(2e-5, 2e-3), "reason.objective.clip_high": (0.2, 0.28, 0.4)},
    seeds=(0, 1),
    search=TPE(trials=20),
    metric="reasoning",
)
