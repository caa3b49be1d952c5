"""Iterated DPO: each round samples answers from the policy, judges them, and trains with the round's first model as reference.

    lm run iterated_dpo

The judge is the rule of experiments/rlhf.py. Another: `--collect1.objective.judge RUN:reward` asks a reward model, and
`people` waits for the label page.
"""

import dataclasses
import runpy
from pathlib import Path

from lm.experiment import DPO, Collect, Optimizer, Source, Stage

rlhf = runpy.run_path(str(Path(__file__).with_name("rlhf.py")))["experiment"]
learnt = tuple(stage for stage in rlhf.stages if stage.name in ("pretrain", "sft"))
ASKED = Source("gen:preferences", holdout=0.05)
ROUNDS = 3


def rounds(number: int) -> tuple[Stage, Stage]:
    """The two stages of round `number`: Collect, and DPO on its rows."""
    collect = Stage(
        name=f"collect{number}",
        objective=Collect(verifier="helpful", answers=4, max_new_tokens=48),
        sources=(ASKED,),
        steps=8,
        batch_size=32,
        seq_len=112,
    )
    dpo = Stage(
        name=f"dpo{number}",
        objective=DPO(beta=0.1),
        sources=(Source(f"collected:collect{number}", holdout=0.0),),
        steps=60,
        batch_size=16,
        seq_len=112,
        optimizer=Optimizer(peak_lr=5e-5, warmup_steps=10, schedule="constant", weight_decay=0.0),
        eval_every=20,
        evals=("judge", "instruct"),
        save_every=60,
    )
    return collect, dpo


experiment = dataclasses.replace(
    rlhf,
    name="iterated_dpo",
    stages=(*learnt, *(stage for number in range(1, ROUNDS + 1) for stage in rounds(number))),
    evals=tuple(item for item in rlhf.evals if item.name in ("judge", "instruct")),
)
