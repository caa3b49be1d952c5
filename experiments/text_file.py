"""The quickstart's four stages on your own text: a .txt file; .jsonl, .jsonl.gz or .parquet with a column `text`; a folder.

Name your text, or copy this file, put its path into TEXT, and run the copy:

    lm run text_file --pretrain.sources.0.path my.txt --name mine

The other stages learn from the generated curriculum until you name files for them in the same way:

    --sft.sources.0.path FILE          rows of `messages`, or of `question` and `answer`
    --preference.sources.0.path FILE   rows of `prompt`, `chosen`, `rejected`
    --reason.sources.0.path FILE       rows of `question` and `answer`

Each is measured on what it holds out of the same file. `lm data text_file …` with the same arguments shows what each stage
will see, before anything is trained.
"""

from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

TEXT = Source("my_text.txt", holdout=0.1)  # a tenth of the documents, or of pieces of 4,000 characters, is held out

INSTRUCT = Source("gen:instruct", holdout=0.05)
PREFERENCES = Source("gen:preferences", holdout=0.05)
PROBLEMS = Source("gen:arithmetic", holdout=0.05)

experiment = Experiment(
    name="text_file",
    prompts=("What is an LLM?", "What is the capital of France?", "What is 37 + 58?"),
    # Pieces of the vocabulary. A small text cannot fill many: the error names the largest number that works.
    tokenizer=Tokenizer(vocab_size=4096),
    # 5.5 million parameters. Twice the embed_dim is four times the parameters, and the time.
    model=Model(
        num_layers=6, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=704, max_len=512, scan_unroll=6
    ),
    stages=(
        Stage(
            name="pretrain",
            objective=Pretrain(z_loss=1e-4),
            sources=(TEXT,),
            # 4 million tokens. A small text is read again and again: if the held-out bits per byte rise, take fewer.
            steps=2000,
            batch_size=8,
            seq_len=256,
            optimizer=Optimizer(kind="muon", peak_lr=2e-3, schedule="wsd", warmup_steps=100),
            eval_every=500,
            evals=("text",),
        ),
        Stage(
            name="sft",
            objective=SFT(),
            # The second source teaches what the last stage begins with: keep it, or give it --sft.sources.1.weight 0.
            sources=(INSTRUCT, PROBLEMS),
            steps=600,
            batch_size=8,
            seq_len=256,  # longer conversations are cut, and counted in the report
            optimizer=Optimizer(kind="muon", peak_lr=1e-3, schedule="wsd", warmup_steps=30),
        ),
        Stage(
            name="preference",
            objective=DPO(beta=0.1),
            sources=(PREFERENCES,),
            steps=100,
            batch_size=8,
            seq_len=256,
            optimizer=Optimizer(peak_lr=5e-5, warmup_steps=10, weight_decay=0.0),
        ),
        Stage(
            name="reason",
            # Prompts have seq_len - max_new_tokens tokens; one that is longer is an error which says by how much.
            objective=GRPO(verifier="answer", group_size=8, max_new_tokens=64),
            sources=(PROBLEMS,),
            steps=100,
            batch_size=8,
            seq_len=192,
            optimizer=Optimizer(peak_lr=1e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
        ),
    ),
    evals=(
        Eval(name="text", source=Source("stage:pretrain"), metric="bits_per_byte", count=128),
        Eval(name="answers", source=Source("stage:sft"), metric="bits_per_byte", count=400),
        Eval(name="pairs", source=Source("stage:preference"), metric="pair_accuracy", count=200),
        Eval(name="reasoning", source=Source("stage:reason"), count=200, max_new_tokens=64),
    ),
)
