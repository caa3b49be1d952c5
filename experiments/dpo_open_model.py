"""DPO with LoRA on an open chat model, on pairs of the better style; settings for a model of 135M parameters on a CPU.

    lm run dpo_open_model --init gguf:FILE            # or hf:FOLDER
    lm export dpo_open_model out/adapter              # in PEFT's format

docs/adapters.md has what SmolLM2-135M-Instruct gained.
"""

from lm.experiment import DPO, Eval, Experiment, LoRA, Model, Optimizer, Source, Stage

experiment = Experiment(
    name="dpo_open_model",
    init="hf:open_model",  # a folder below the current one; --init names another
    prompts=("What is 3 + 5?",),
    model=Model(max_len=96, param_dtype="float32", compute_dtype="bfloat16", remat="none"),
    stages=(
        Stage(
            name="dpo",
            objective=DPO(beta=0.1),
            sources=(Source("gen:preferences", holdout=0.05, bad_rows="drop"),),
            optimizer=Optimizer(peak_lr=3e-4, warmup_steps=2, weight_decay=0.0),
            lora=LoRA(rank=16, alpha=32),
            steps=12,
            batch_size=8,
            seq_len=96,
            save_every=6,
        ),
    ),
    evals=(Eval("pairs", Source("stage:dpo"), metric="pair_accuracy", count=100),),
)
