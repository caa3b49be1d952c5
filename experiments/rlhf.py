"""RLHF from start to end: collect preferences on a small model's answers, train a reward model, then PPO and DPO.

The judge is a program (half of the reward for a right answer, half for style) whose choices are stored as those of the label
page. It also scores held-out answers, which shows when the policy overoptimises the reward model.
"""

from lm.experiment import (
    DPO,
    PPO,
    SFT,
    Collect,
    Eval,
    Experiment,
    Model,
    Optimizer,
    Pretrain,
    RewardModel,
    Source,
    Stage,
    Tokenizer,
)

DRILLS = Source("gen:drills", weight=0.5, holdout=0.01)
DOCS = Source("gen:docs", weight=0.5, holdout=0.04)
INSTRUCT = Source("gen:instruct", holdout=0.05)
ASKED = Source("gen:preferences", holdout=0.05)
CHOICES = Source("collected:collect", holdout=0.1)

experiment = Experiment(
    name="rlhf",
    prompts=("What is the capital of France?", "What is a list?", "Which number is larger, 36 or 62?"),
    tokenizer=Tokenizer(vocab_size=2048),
    model=Model(
        num_layers=4,
        embed_dim=160,
        num_heads=4,
        num_kv_heads=2,
        head_dim=40,
        mlp_dim=448,
        max_len=160,
        tied_head=False,
        scan_unroll=4,
    ),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(z_loss=1e-4),
            sources=(DOCS, DRILLS),
            steps=400,
            batch_size=6,
            seq_len=160,
            optimizer=Optimizer(kind="muon", peak_lr=4e-3, schedule="wsd", decay_frac=0.3),
            save_every=400,
        ),
        Stage(
            name="sft",
            objective=SFT(),
            sources=(INSTRUCT,),
            steps=900,
            batch_size=8,
            seq_len=128,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, b2=0.99, schedule="wsd", decay_frac=0.4),
            save_every=450,
        ),
        Stage(
            name="collect",
            objective=Collect(verifier="helpful", answers=4, max_new_tokens=48),
            sources=(ASKED,),
            steps=16,
            batch_size=32,
            seq_len=112,
        ),
        Stage(
            name="reward",
            objective=RewardModel(center_coef=0.01),
            sources=(CHOICES,),
            steps=150,
            batch_size=16,
            seq_len=112,
            optimizer=Optimizer(peak_lr=2e-4, warmup_steps=15),
            save_every=150,
        ),
        Stage(
            name="ppo",
            objective=PPO(
                reward_models=("reward",),
                verifier="helpful",
                max_new_tokens=48,
                kl_coef=0.02,
                missing_eos_penalty=1.0,
                epochs=2,
                minibatches=4,
            ),
            sources=(ASKED,),
            steps=120,
            batch_size=64,
            seq_len=112,
            optimizer=Optimizer(peak_lr=1e-4, warmup_steps=20, schedule="constant", weight_decay=0.0),
            eval_every=10,
            evals=("judge", "instruct"),
            save_every=20,
        ),
        Stage(
            name="dpo",
            objective=DPO(beta=0.1),
            sources=(CHOICES,),
            start="sft",
            steps=160,
            batch_size=16,
            seq_len=112,
            optimizer=Optimizer(peak_lr=5e-5, warmup_steps=20, schedule="constant", weight_decay=0.0),
            eval_every=20,
            evals=("judge", "instruct"),
            save_every=40,
        ),
    ),
    evals=(
        Eval("judge", ASKED, verifier="helpful", count=256, max_new_tokens=48, temperature=1.0),
        Eval("instruct", INSTRUCT, count=128, max_new_tokens=48),
        Eval("choices", CHOICES, "pair_accuracy", count=300, max_new_tokens=48),
        Eval(
            "best_of_n",
            ASKED,
            "best_of_n",
            verifier="helpful",
            count=256,
            max_new_tokens=48,
            temperature=1.0,
            best_of=16,
        ),
    ),
)
