"""Pretrain the shape of Llama 3.1 8B on a v6e 4x4: `lm plan pods.llama3_8b_v6e --topology v6e:4x4`."""

import dataclasses
import runpy
from pathlib import Path

v5p = runpy.run_path(str(Path(__file__).with_name("llama3_8b_v5p.py")))["experiment"]

experiment = dataclasses.replace(
    v5p,
    name="llama3_8b_v6e",
    model=dataclasses.replace(v5p.model, remat="minimal", max_logits=2**29),
    stages=tuple(dataclasses.replace(stage, batch_size=16) for stage in v5p.stages),
)
