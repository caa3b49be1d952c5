"""Train a reward model on your own preferences: a small model is trained by SFT on conversations, then on pairs of answers.

    lm run reward --sft.sources.0.path CONVERSATIONS --reward.sources.0.path PREFERENCES
    lm eval reward --pairs PREFERENCES --heldout 0.15

CONVERSATIONS are rows of `messages`, PREFERENCES of `prompt`, `chosen`, `rejected`: files or folders. Pairs longer
than `seq_len` are left-truncated, prompt first. The held-out split is by prompt, so all pairs of a prompt are on the same side.
"""

from lm.experiment import SFT, Eval, Experiment, Model, Optimizer, RewardModel, Source, Stage, Tokenizer

PREFERENCES = Source("preferences.jsonl", holdout=0.15)

experiment = Experiment(
    name="reward",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=4096),
    model=Model(
        num_layers=4, embed_dim=192, num_heads=4, num_kv_heads=2, head_dim=48, mlp_dim=512, max_len=320, scan_unroll=4
    ),
    stages=(
        Stage(
            name="sft",
            objective=SFT(),
            sources=(Source("conversations.jsonl"),),
            steps=600,
            batch_size=12,
            seq_len=320,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, schedule="wsd", warmup_steps=50, decay_frac=0.4),
            save_every=200,
        ),
        Stage(
            name="reward",
            objective=RewardModel(center_coef=0.01),
            sources=(PREFERENCES,),
            steps=350,
            batch_size=16,
            seq_len=320,
            optimizer=Optimizer(peak_lr=3e-4, warmup_steps=30),
            save_every=50,
        ),
    ),
    evals=(Eval("pairs", Source("stage:reward"), "pair_accuracy", count=1000, max_new_tokens=8),),
)
