"""Base model of the reinforcement learning claims: a small model that adds digits, right about half of the time."""

import dataclasses

from lm.experiment import GRPO, SFT, Eval, Experiment, Model, Optimizer, Source, Stage, Tokenizer

CHAINS = Source("gen:chains", holdout=0.2)

experiment = Experiment(
    name="small_reasoner",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=320),
    model=Model(
        num_layers=2,
        embed_dim=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mlp_dim=256,
        max_len=112,
        scan_unroll=2,
    ),
    stages=(
        Stage(
            name="sft",
            objective=SFT(),
            sources=(CHAINS,),
            steps=800,
            batch_size=16,
            seq_len=112,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, b2=0.99, schedule="wsd", decay_frac=0.3),
            save_every=1200,
        ),
        Stage(
            name="reason",
            objective=GRPO(group_size=8, max_new_tokens=64),
            sources=(CHAINS,),
            steps=120,
            batch_size=16,
            seq_len=112,
            optimizer=Optimizer(peak_lr=1e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
            eval_every=30,
            evals=("chains",),
            save_every=120,
        ),
    ),
    evals=(Eval("chains", CHAINS, count=256, max_new_tokens=64, temperature=1.0),),
)

# Less than a minute's worth, to see that a claim's code still works.
SHORT = 8  # tokens of an answer
quick = dataclasses.replace(
    experiment,
    model=dataclasses.replace(
        experiment.model, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64
    ),
    stages=tuple(
        dataclasses.replace(
            stage,
            steps=4,
            batch_size=2,
            save_every=4,
            eval_every=2 * bool(stage.eval_every),
            optimizer=dataclasses.replace(stage.optimizer, warmup_steps=2),
        )
        for stage in (
            experiment.stages[0],
            dataclasses.replace(
                experiment.stages[1], objective=GRPO(group_size=4, max_new_tokens=SHORT), seq_len=48 + SHORT
            ),
        )
    ),
    evals=(dataclasses.replace(experiment.evals[0], count=8, max_new_tokens=SHORT),),
)
