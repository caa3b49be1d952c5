"""A sweep whose trials take some seconds: two stages, of which the trials share the first."""

from lm.experiment import SFT, Eval, Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer
from lm.sweep.sweep import Sweep

FAST = Optimizer(peak_lr=1e-3, warmup_steps=2)
DRILLS = Source("gen:drills", holdout=0.1)

base = Experiment(
    name="tiny",
    prompts=(),
    mesh=Mesh(data=1),
    tokenizer=Tokenizer(vocab_size=400),
    model=Model(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, max_len=64),
    stages=(
        Stage("pretrain", Pretrain(), (DRILLS,), steps=6, batch_size=2, seq_len=64, optimizer=FAST),
        Stage(
            "sft",
            SFT(),
            (Source("gen:arithmetic", holdout=0.5),),
            steps=6,
            batch_size=2,
            seq_len=64,
            optimizer=FAST,
            eval_every=2,
            evals=("text",),
            save_every=2,
        ),
    ),
    evals=(Eval("text", DRILLS, "bits_per_byte", count=4, max_new_tokens=8),),
)
sweep = Sweep("tiny", base, {"sft.optimizer.peak_lr": (1e-3, 3e-3)}, seeds=(0, 1))
