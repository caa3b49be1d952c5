"""GRPO on Python code that is judged by tests: functions of one line. A few minutes on a CPU.

    lm run write_code

An SFT stage imitates demonstrations (write_code.jsonl) whose operator is right half of the time. GRPO then trains on the tests of
each row. The model's code runs in a sandbox: bubblewrap where it is installed, else Linux namespaces; the log names it.
"""

from pathlib import Path

from lm.experiment import GRPO, SFT, Eval, Experiment, Model, Optimizer, Source, Stage, Tokenizer

functions = Source(str(Path(__file__).with_name("write_code.jsonl")), holdout=0.2)

experiment = Experiment(
    name="write_code",
    prompts=("Write f(x): x plus 7",),
    tokenizer=Tokenizer(vocab_size=300),
    model=Model(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_len=96),
    stages=(
        Stage(
            "sft", SFT(), (functions,), Optimizer(peak_lr=3e-3), steps=300, batch_size=16, seq_len=96, save_every=300
        ),
        Stage(
            "grpo",
            GRPO(verifier="python_tests", group_size=8, max_new_tokens=32),
            (functions,),
            Optimizer(peak_lr=1e-3, warmup_steps=5),
            steps=30,
            batch_size=8,
            seq_len=96,
            save_every=30,
        ),
    ),
    evals=(Eval("functions", functions, verifier="python_tests", count=20, max_new_tokens=32),),
)
