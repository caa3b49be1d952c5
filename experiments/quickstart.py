"""All four stages on two CPU cores in about ten minutes: pretraining, SFT, preferences (style), GRPO (reasoning)."""

from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

DOCS = Source("gen:docs", weight=0.5, holdout=0.04)
DRILLS = Source("gen:drills", weight=0.5, holdout=0.01)
INSTRUCT = Source("gen:instruct", weight=0.6, holdout=0.05)
ARITHMETIC = Source("gen:arithmetic", weight=0.4, holdout=0.05)
PREFERENCES = Source("gen:preferences", holdout=0.05)

experiment = Experiment(
    name="quickstart",
    prompts=(
        "What is an LLM?",
        "Write a Python function that adds two numbers.",
        "What is the capital of France?",
        "What is 37 + 58?",
        "Say these words backwards: moon, river, goat",
    ),
    tokenizer=Tokenizer(vocab_size=3072),
    model=Model(
        num_layers=4,
        embed_dim=160,
        num_heads=4,
        num_kv_heads=2,
        head_dim=40,
        mlp_dim=448,
        max_len=256,
        tied_head=False,
        scan_unroll=4,
    ),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(z_loss=1e-4),
            sources=(DOCS, DRILLS),
            steps=1000,
            batch_size=4,
            seq_len=256,
            optimizer=Optimizer(kind="muon", peak_lr=4e-3, schedule="wsd", warmup_steps=50, decay_frac=0.3),
            save_every=300,
            keep_moments=False,
        ),
        Stage(
            name="sft",
            objective=SFT(),
            sources=(INSTRUCT, ARITHMETIC),
            steps=2000,
            batch_size=8,
            seq_len=128,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, b2=0.99, schedule="wsd", warmup_steps=50, decay_frac=0.4),
            eval_every=1000,
            evals=("instruct",),
            save_every=500,
            keep_moments=False,
        ),
        Stage(
            name="preference",
            objective=DPO(beta=0.1),
            sources=(PREFERENCES,),
            steps=50,
            batch_size=16,
            seq_len=96,
            optimizer=Optimizer(peak_lr=4e-5, warmup_steps=10, weight_decay=0.0),
            save_every=50,
            keep_moments=False,
        ),
        Stage(
            name="reason",
            objective=GRPO(group_size=8, max_new_tokens=64),
            sources=(Source("gen:arithmetic", holdout=0.05),),
            steps=48,
            batch_size=16,
            seq_len=112,
            microbatches=2,
            optimizer=Optimizer(peak_lr=2e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
            eval_every=16,
            evals=("reasoning",),
            save_every=16,
            keep_moments=False,
        ),
    ),
    evals=(
        Eval(name="docs", source=DOCS, metric="bits_per_byte", count=192),
        Eval(name="instruct", source=INSTRUCT, count=200, max_new_tokens=64),
        Eval(name="pairs", source=PREFERENCES, metric="pair_accuracy", count=200),
        Eval(name="manners", source=PREFERENCES, verifier="style", count=200, max_new_tokens=64, temperature=1.0),
        Eval(name="reasoning", source=ARITHMETIC, count=300, max_new_tokens=64),
    ),
)
