"""GRPO with adapters on the shape of Qwen 3 8B on a v6e 2x2: `lm plan pods.qwen3_8b_grpo_v6e --topology v6e:2x2`."""

import dataclasses
import runpy
from pathlib import Path

from lm.experiment import LoRA, RolloutMesh

small, grpo = (
    runpy.run_path(str(Path(__file__).with_name(name)))["experiment"]
    for name in ("qwen3_0_6b_v5e.py", "llama3_8b_grpo_v5p.py")
)

experiment = dataclasses.replace(
    small,
    name="qwen3_8b_grpo_v6e",
    model=dataclasses.replace(
        small.model,
        num_layers=36,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=12288,
        tied_head=False,
        param_dtype="bfloat16",
        remat="minimal",
    ),
    rollout_mesh=RolloutMesh(tensor=4),
    stages=tuple(
        dataclasses.replace(stage, lora=LoRA(rank=16, alpha=32, merge_for_sampling=True), microbatches=16)
        for stage in grpo.stages
    ),
)
