"""Pretrain the shape of Llama 3.1 8B on a v6e 4x4: `lm plan pods.llama3_8b_v6e --topology v6e:4x4`."""

from lm.experiment import Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

experiment = Experiment(
    name="llama3_8b_v6e",
    tokenizer=Tokenizer(vocab_size=128256),
    model=Model(
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        max_len=8192,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        qk_norm=False,
        tied_head=False,
        compute_dtype="bfloat16",
        logits_dtype="bfloat16",
        max_logits=2**29,
        remat="minimal",
    ),
    mesh=Mesh(data=1, fsdp=-1),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(),
            sources=(Source("text"),),  # a folder of .txt, .jsonl or .parquet files
            steps=100_000,
            batch_size=16,
            seq_len=8192,
            optimizer=Optimizer(peak_lr=3e-4, warmup_steps=2000),
            save_every=1000,
        ),
    ),
)
