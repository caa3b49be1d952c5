"""What tests of whole runs share: their curves, and a run that was killed after a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lm.experiment import SFT, Collect, Eval, Experiment, Mesh, Model, Optimizer, Source, Stage, Tokenizer
from lm.train.metrics import read_lines
from lm.train.rerun import CLOCKS

CONSTANT = Optimizer(peak_lr=3e-3, warmup_steps=1, schedule="constant")


def experiment(root: Path, **sft) -> Experiment:
    """Collect and then SFT, of few steps, on `write_questions`; `sft` changes fields of the second stage."""
    asked = Source(str(root / "asked.jsonl"), holdout=0.2)
    few = {"batch_size": 4, "seq_len": 48}
    return Experiment(
        name="resume",
        prompts=("Tell abcd",),
        tokenizer=Tokenizer(vocab_size=320),
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=64),
        mesh=Mesh(data=1),
        stages=(
            Stage("collect", Collect(verifier="style", max_new_tokens=4, make="best"), (asked,), steps=1, **few),
            Stage("sft", SFT(), (Source("collected:collect", holdout=0.0), asked), CONSTANT, **few | {"steps": 4, "save_every": 2} | sft),
        ),
        evals=(Eval("asked", asked, verifier="style", count=4, max_new_tokens=4),),
    )  # fmt: skip


def write_questions(root: Path) -> None:
    words = [a + b + c for a in "bdgk" for b in "aeio" for c in "lmn"]
    rows = [{"question": f"Tell {word}", "answer": f"Gladly. {word} no"} for word in words]
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(run_dir: Path, stage: str) -> list[dict]:
    """The lines of a stage's metrics, but for the clock."""
    lines = read_lines(run_dir / "stages" / stage / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def forget_last_checkpoint(run_dir: Path, stage: str, saved: int) -> None:
    """As if the stage had been killed before it saved the last of its checkpoints, of which there are `saved`."""
    here = run_dir / "stages" / stage
    (here / "summary.json").unlink()
    checkpoints = sorted(path for path in (here / "checkpoints").iterdir() if path.is_dir())
    assert len(checkpoints) == saved
    shutil.rmtree(checkpoints[-1])
