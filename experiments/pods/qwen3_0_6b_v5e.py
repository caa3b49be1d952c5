"""Pretrain the shape of Qwen 3 0.6B on a v5e 4x4: `lm plan pods.qwen3_0_6b_v5e --topology v5e:4x4`."""

from lm.experiment import Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

experiment = Experiment(
    name="qwen3_0_6b_v5e",
    tokenizer=Tokenizer(vocab_size=151936),
    model=Model(
        num_layers=28,
        embed_dim=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=3072,
        max_len=2048,
        rope_theta=1e6,
        compute_dtype="bfloat16",
        logits_dtype="bfloat16",
        max_logits=2**31,
        remat="dots",
    ),
    mesh=Mesh(data=1, fsdp=-1),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(),
            sources=(Source("text"),),  # a folder of .txt, .jsonl or .parquet files
            steps=100_000,
            batch_size=64,
            seq_len=2048,
            optimizer=Optimizer(peak_lr=3e-4, warmup_steps=2000),
            save_every=1000,
        ),
    ),
)
