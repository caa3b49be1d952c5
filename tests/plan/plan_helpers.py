"""Experiments that several plan tests share."""

import dataclasses

from lm.experiment import Experiment, Mesh, Model, Optimizer, Pretrain, RolloutMesh, Source, Stage, Tokenizer

MODEL = Model(
    num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=512, max_len=256,
    compute_dtype="bfloat16", remat="full",
)  # fmt: skip


def experiment(objective=None, model=None, mesh=None, rows=16, vocab_size=1024, rollout=0, **stage) -> Experiment:
    """One stage, `train`, of a small model; fsdp over all devices."""
    values = {"batch_size": rows, "seq_len": 256} | stage
    only = Stage("train", objective or Pretrain(), (Source("text.txt"),), Optimizer(), **values)
    return Experiment(
        name="planned",
        stages=(only,),
        tokenizer=Tokenizer(vocab_size=vocab_size),
        model=dataclasses.replace(MODEL, **(model or {})),
        mesh=Mesh(**({"data": 1, "fsdp": -1} | (mesh or {}))),
        rollout_mesh=RolloutMesh(rollout),
    )


# The shapes of the ahead-of-time table of the README: (model, vocabulary, tokens a row, rows a device, topology).
QWEN3_0_6B = {
    "num_layers": 28, "embed_dim": 1024, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 3072,
    "max_len": 2048, "qk_norm": True, "tied_head": True,
}  # fmt: skip
LLAMA3_8B = {
    "num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 14336,
    "max_len": 8192, "qk_norm": False, "tied_head": False,
}  # fmt: skip
