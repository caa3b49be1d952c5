"""GRPO with LoRA on an open chat model, on problems with short answers; settings for a model of 135M parameters on a CPU.

    lm run grpo_open_model --init gguf:FILE           # or hf:FOLDER
    lm export grpo_open_model out/adapter             # in PEFT's format

docs/adapters.md has what SmolLM2-135M-Instruct gained.
"""

from lm.experiment import GRPO, Eval, Experiment, LoRA, Model, Optimizer, Source, Stage

experiment = Experiment(
    name="grpo_open_model",
    init="hf:open_model",  # a folder below the current one; --init names another
    prompts=("What is 3 + 5?", 'Give the plural of "cup".'),
    model=Model(max_len=128, param_dtype="float32", compute_dtype="bfloat16", remat="none"),
    stages=(
        Stage(
            name="grpo",
            # At temperature 1 a small model seldom answers in the form that the verifier reads.
            objective=GRPO(verifier="answer", group_size=8, max_new_tokens=16, temperature=0.7),
            sources=(Source("gen:short_answers", holdout=0.5),),  # 336 problems
            optimizer=Optimizer(peak_lr=3e-4, warmup_steps=2, schedule="constant", weight_decay=0.0),
            lora=LoRA(rank=16, alpha=32, merge_for_sampling=True),
            steps=20,
            batch_size=8,
            seq_len=96,
            save_every=10,
        ),
    ),
    evals=(Eval("problems", Source("stage:grpo"), count=200, max_new_tokens=16),),
)
