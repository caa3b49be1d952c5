"""Pretrain the shape of Llama 2 70B on a v5p 4x4x4: `lm plan pods.llama2_70b_v5p --topology v5p:4x4x4`."""

import dataclasses
import runpy
from pathlib import Path

from lm.experiment import Optimizer, Tokenizer

small = runpy.run_path(str(Path(__file__).with_name("llama3_8b_v5p.py")))["experiment"]

experiment = dataclasses.replace(
    small,
    name="llama2_70b_v5p",
    tokenizer=Tokenizer(vocab_size=32000),
    model=dataclasses.replace(
        small.model,
        num_layers=80,
        embed_dim=8192,
        num_heads=64,
        mlp_dim=28672,
        max_len=4096,
        rope_theta=10_000.0,
        remat="minimal",
        max_logits=2**30,
    ),
    stages=tuple(
        dataclasses.replace(stage, batch_size=128, seq_len=4096, optimizer=Optimizer(peak_lr=1.5e-4, warmup_steps=2000))
        for stage in small.stages
    ),
)
