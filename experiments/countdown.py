"""GRPO in the built-in environment `countdown`: make a target from three numbers (docs/results.md has a measured run).

    lm run countdown

An SFT stage imitates demonstrations of which one in five searches and the others guess (`lm/data/curriculum/countdown.py`); GRPO
can find out that searching is right. The eval samples at temperature 1, so that its reward is pass@1.
"""

from lm.experiment import GRPO, SFT, Eval, Experiment, Model, Optimizer, Source, Stage, Tokenizer

TASKS = Source("gen:countdown", holdout=0.2)

experiment = Experiment(
    name="countdown",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=330),
    model=Model(
        num_layers=3,
        embed_dim=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mlp_dim=256,
        max_len=328,
        scan_unroll=3,
    ),
    stages=(
        Stage(
            name="sft",
            objective=SFT(),
            sources=(TASKS,),
            steps=4000,
            batch_size=16,
            seq_len=328,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, b2=0.99, schedule="wsd", decay_frac=0.3),
            save_every=2000,
        ),
        Stage(
            name="reason",
            objective=GRPO(environment="countdown", group_size=8, max_new_tokens=292),
            sources=(TASKS,),
            steps=100,
            batch_size=16,
            seq_len=328,
            optimizer=Optimizer(peak_lr=2e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
            eval_every=25,
            evals=("countdown",),
            save_every=50,
        ),
    ),
    evals=(Eval("countdown", TASKS, environment="countdown", count=256, max_new_tokens=292, temperature=1.0),),
)
