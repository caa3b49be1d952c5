"""Base experiment of the pretraining claims: a small language model of the Python documentation."""

import dataclasses

from lm.experiment import Eval, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

DOCS = Source("gen:docs", holdout=0.05)

experiment = Experiment(
    name="tiny_text",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=1024),
    model=Model(
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=352,
        max_len=128,
        scan_unroll=4,
    ),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(),
            sources=(DOCS,),
            steps=300,
            batch_size=8,
            seq_len=128,
            optimizer=Optimizer(peak_lr=3e-3, warmup_steps=30, weight_decay=0.1),
            save_every=1000,
        ),
    ),
    evals=(Eval("docs", DOCS, "bits_per_byte", count=192),),
)

# A minute's worth, to see that a claim's code still works.
quick = dataclasses.replace(
    experiment,
    tokenizer=Tokenizer(vocab_size=512),
    model=dataclasses.replace(
        experiment.model, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, max_len=64
    ),
    stages=(
        dataclasses.replace(
            experiment.stages[0],
            steps=4,
            batch_size=4,
            seq_len=64,
            optimizer=dataclasses.replace(experiment.stages[0].optimizer, warmup_steps=2),
        ),
    ),
    evals=(dataclasses.replace(experiment.evals[0], count=8, max_new_tokens=8),),
)
