"""Adapt an open chat model with LoRA: instruction tuning, DPO on preference pairs, GRPO on problems with a verifier.

    lm run adapt_open_model --init hf:FOLDER          # a folder with config.json, *.safetensors and tokenizer files
    lm run adapt_open_model --init gguf:FILE          # or a GGUF file, with the extra gguf
    lm export adapt_open_model out/adapter            # the three adapters as one, in PEFT's format

The data is generated until you name your own files, in the same way for a run, `lm data`, `lm eval` and `lm plan`:

    --sft.sources.0.path FILE      rows of `messages`, or of `question` and `answer`
    --dpo.sources.0.path FILE      rows of `prompt`, `chosen`, `rejected`
    --grpo.sources.0.path FILE     rows of `question` and `answer`: problems that the model solves now and then

Each stage is measured on what it holds out of its source, before the first stage and after each. A full-weights run differs by
`lora.rank` 0 in each stage, and usually needs lower learning rates. docs/adapters.md has settings for CPUs.
"""

from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, LoRA, Mesh, Model, Optimizer, Source, Stage

# Trains 16 directions of every linear layer of the blocks; the weights themselves are only read. With rank 0 they train.
ADAPTER = LoRA(rank=16, alpha=32)

experiment = Experiment(
    name="adapt_open_model",
    init="hf:open_model",  # a folder below the current one; --init names another
    prompts=(
        "What is the capital of France?",
        "Explain in two sentences why the sky is blue.",
        "How do I politely decline an invitation?",
        "What is 37 + 58?",
        "Tom has 4 boxes of 6 pens and gives away 5 pens. How many pens are left?",
    ),
    # The shape is that of the weights. bfloat16 (with float32 copies of what trains) and remat suit 135M to 8B parameters.
    model=Model(max_len=1024, param_dtype="bfloat16", compute_dtype="bfloat16", remat="full"),
    mesh=Mesh(data=1, fsdp=-1),  # several devices split the weights; full copies are --mesh.data -1 --mesh.fsdp 1
    stages=(
        Stage(
            name="sft",
            objective=SFT(),
            sources=(Source("gen:instruct", holdout=0.05),),
            optimizer=Optimizer(peak_lr=2e-4, warmup_steps=10, weight_decay=0.0),
            lora=ADAPTER,
            steps=300,
            batch_size=16,  # rows of packed conversations
            seq_len=1024,
            eval_every=100,
            evals=("answers",),
            save_every=100,
        ),
        Stage(
            name="dpo",
            # The reference is the model that entered this stage: the same weights with this stage's factors off.
            objective=DPO(beta=0.1),
            sources=(Source("gen:preferences", holdout=0.05, bad_rows="drop"),),
            optimizer=Optimizer(peak_lr=5e-5, warmup_steps=10, weight_decay=0.0),
            lora=ADAPTER,
            steps=200,
            batch_size=16,
            seq_len=1024,
            eval_every=100,
            evals=("pairs",),
            save_every=100,
        ),
        Stage(
            name="grpo",
            # At temperature 1 a small model seldom answers in the form that the verifier reads.
            objective=GRPO(verifier="answer", group_size=8, max_new_tokens=24, temperature=0.7),
            sources=(Source("gen:short_answers", holdout=0.5),),  # 336 problems
            optimizer=Optimizer(peak_lr=1e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
            lora=ADAPTER,
            steps=100,
            batch_size=16,
            seq_len=128,
            eval_every=25,
            evals=("problems",),
            save_every=25,
        ),
    ),
    evals=(
        Eval("answers", Source("stage:sft"), metric="bits_per_byte", count=64),
        Eval("pairs", Source("stage:dpo"), metric="pair_accuracy", count=200),
        Eval("problems", Source("stage:grpo"), count=200, max_new_tokens=24),
    ),
)
