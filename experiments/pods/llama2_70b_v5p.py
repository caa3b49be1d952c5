"""Pretrain the shape of Llama 2 70B on a v5p 4x4x4: `lm plan pods.llama2_70b_v5p --topology v5p:4x4x4`."""

from lm.experiment import Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

experiment = Experiment(
    name="llama2_70b_v5p",
    tokenizer=Tokenizer(vocab_size=32000),
    model=Model(
        num_layers=80,
        embed_dim=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=28672,
        max_len=4096,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        qk_norm=False,
        tied_head=False,
        compute_dtype="bfloat16",
        logits_dtype="bfloat16",
        max_logits=2**30,
        remat="minimal",
    ),
    mesh=Mesh(data=1, fsdp=-1),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(),
            sources=(Source("text"),),  # a folder of .txt, .jsonl or .parquet files
            steps=100_000,
            batch_size=128,
            seq_len=4096,
            optimizer=Optimizer(peak_lr=1.5e-4, warmup_steps=2000),
            save_every=1000,
        ),
    ),
)
