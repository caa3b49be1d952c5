"""GRPO of the shape of Qwen 3 0.6B on a v5e 2x4: `lm plan pods.qwen3_0_6b_grpo_v5e --topology v5e:2x4`."""

import dataclasses
import runpy
from pathlib import Path

from lm.experiment import RolloutMesh

small, grpo = (
    runpy.run_path(str(Path(__file__).with_name(name)))["experiment"]
    for name in ("qwen3_0_6b_v5e.py", "llama3_8b_grpo_v5p.py")
)

experiment = dataclasses.replace(
    small,
    name="qwen3_0_6b_grpo_v5e",
    model=dataclasses.replace(small.model, remat="minimal"),
    rollout_mesh=RolloutMesh(tensor=2),
    stages=grpo.stages,
)
