"""GRPO of the shape of Llama 3.1 8B on a v5p 2x4x4: `lm plan pods.llama3_8b_grpo_v5p --topology v5p:2x4x4`.

A step samples 256 completions, 8 for each of 32 prompts, of at most 1,024 tokens after prompts of at most 1,024. The weights
are sharded over all devices in training, and over groups of 8 in sampling, where no step gathers them.
"""

import dataclasses
import runpy
from pathlib import Path

from lm.experiment import GRPO, Optimizer, RolloutMesh, Source, Stage

v5p = runpy.run_path(str(Path(__file__).with_name("llama3_8b_v5p.py")))["experiment"]

experiment = dataclasses.replace(
    v5p,
    name="llama3_8b_grpo_v5p",
    model=dataclasses.replace(v5p.model, max_len=2048),
    rollout_mesh=RolloutMesh(tensor=8),
    stages=(
        Stage(
            name="reason",
            objective=GRPO(verifier="math", group_size=8, max_new_tokens=1024, kl_coef=0.001),
            sources=(Source("problems"),),  # a folder of .jsonl or .parquet files with columns question and answer
            optimizer=Optimizer(peak_lr=1e-6, warmup_steps=10, schedule="constant", weight_decay=0.0),
            steps=1000,
            batch_size=32,
            seq_len=2048,
            microbatches=4,
            save_every=50,
        ),
    ),
)
