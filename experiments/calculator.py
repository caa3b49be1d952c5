"""GRPO in the built-in environment `calculator`: products that a small model gets right only with a tool. Minutes on two CPU cores.

    lm run calculator

An SFT stage imitates demonstrations of which about one in six calls the calculator and the others guess; GRPO finds out that calling it is right.
An episode with a call has two turns: `<tool>calc: 37 * 48</tool>`, then the answer.
"""

from lm.experiment import GRPO, SFT, Eval, Experiment, Model, Optimizer, Source, Stage, Tokenizer

TASKS = Source("gen:products", holdout=0.2)

experiment = Experiment(
    name="calculator",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=300),
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
            sources=(TASKS,),
            steps=400,
            batch_size=16,
            seq_len=96,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, b2=0.99, schedule="wsd", decay_frac=0.3),
            save_every=200,
        ),
        Stage(
            name="reason",
            objective=GRPO(environment="calculator", group_size=8, max_new_tokens=64, max_turns=3),
            sources=(TASKS,),
            steps=40,
            batch_size=16,
            seq_len=104,
            optimizer=Optimizer(peak_lr=2e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
            eval_every=10,
            evals=("products",),
            save_every=20,
        ),
    ),
    evals=(
        Eval("products", TASKS, environment="calculator", count=128, max_new_tokens=64, max_turns=3, temperature=1.0),
    ),
)
