"""The quickstart's four stages in under three minutes: a first look, too small for meaningful results."""

import dataclasses
import runpy
from pathlib import Path

quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["experiment"]

STEPS = {"pretrain": 300, "sft": 400, "preference": 20, "reason": 10}

experiment = dataclasses.replace(
    quickstart,
    name="tiny",
    model=dataclasses.replace(
        quickstart.model,
        num_layers=3,
        embed_dim=96,
        num_heads=3,
        num_kv_heads=1,
        head_dim=32,
        mlp_dim=256,
        scan_unroll=3,
    ),
    stages=tuple(
        dataclasses.replace(stage, steps=STEPS[stage.name], save_every=STEPS[stage.name], eval_every=0)
        for stage in quickstart.stages
    ),
    evals=tuple(dataclasses.replace(item, count=min(item.count, 64)) for item in quickstart.evals),
)
