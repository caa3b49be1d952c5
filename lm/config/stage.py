"""One stage of an experiment: objective, mixture of data, optimizer, steps, batches, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lm.config.field import knob
from lm.config.objectives import Objective

O_co = TypeVar("O_co", bound=Objective, covariant=True)


@dataclass(frozen=True)
class Optimizer:
    kind: Literal["adamw", "muon"] = knob(
        "adamw", "optimizer; muon: muon for the matrices of the blocks, adamw for the rest"
    )
    peak_lr: float = knob(1e-3, "learning rate after the warmup", least=1e-12, most=1000)
    schedule: Literal["constant", "cosine", "wsd"] = knob("cosine", "learning rate schedule after the warmup")
    warmup_steps: int = knob(
        20, "updates of linear warmup; the first update has peak_lr / warmup_steps", least=0, most=10**9
    )
    decay_frac: float = knob(0.2, "fraction of the updates in wsd's decay", least=0, most=1)
    final_lr_frac: float = knob(0.1, "final learning rate as a fraction of the peak", least=0, most=1)
    b2: float = knob(0.95, "AdamW decay of the second moment", least=0, most=0.99999)
    weight_decay: float = knob(0.1, "decoupled weight decay, on matrices only", least=0, most=1000)
    state_dtype: Literal["float32", "bfloat16"] = knob(
        "float32", "dtype of the moments, whatever the parameters' dtype"
    )
    clip_norm: float = knob(1.0, "largest global norm of the gradient", least=1e-6, most=1e30)
    master_weights: bool = knob(
        True,
        "with model.param_dtype below float32: keep float32 copies of the parameters with the moments, which take the "
        "updates; without them most updates are rounded away",
    )


@dataclass(frozen=True)
class Source:
    path: str = knob(
        help="file, folder of files, tfds:NAME/SPLIT, gen:NAME, collected:STAGE of collect; of an eval also stage:NAME, that stage's"
    )
    weight: float = knob(1.0, "share of this source in the mixture; 0: not trained on", least=0, most=1e9)
    holdout: float = knob(
        0.02,
        "fraction of rows held out of training, by a hash of their prompts; 0: none, 1: all",
        least=0,
        most=1,
    )
    columns: tuple[str, ...] = knob((), "columns to rename, as ours=theirs: prompt=query,completion=reply")
    bad_rows: Literal["stop", "drop"] = knob(
        "stop", "broken rows and too long prompts: stop at the first, or drop and count"
    )


@dataclass(frozen=True)
class Stage(Generic[O_co]):
    name: str = knob(help="name of the stage, and of its folder", name=True)
    objective: O_co = knob(help="what is minimised")
    sources: tuple[Source, ...] = knob(help="the mixture of data")
    optimizer: Optimizer = Optimizer()
    steps: int = knob(
        1000,
        "steps; where completions are sampled, one is a rollout with its updates, or a batch of prompts to collect",
        least=1,
        most=10**9,
    )
    batch_size: int = knob(
        32,
        "examples in a step, over all devices: rows of text or conversations, pairs, labelled answers or prompts, whichever "
        "the objective reads",
        least=1,
        most=2**24,
    )
    seq_len: int = knob(256, "tokens in a row", least=2, most=2**26)
    microbatches: int = knob(1, "pieces that a batch is cut into to save memory", least=1, most=2**24)
    trainable: tuple[str, ...] = knob(
        (),
        "parameters that train, by patterns of their paths: policy/*norm* trains the norms, !policy/embed all but the "
        "embedding; empty: all",
    )
    eval_every: int = knob(
        0,
        "steps between held-out evaluations with samples; 0: only before and after",
        least=0,
        most=10**9,
        affects_training=False,
    )
    evals: tuple[str, ...] = knob(
        (), "names of the evals that are taken every eval_every steps too", affects_training=False
    )
    save_every: int = knob(100, "steps between checkpoints", least=1, most=10**9, affects_training=False)
    start: str = knob("", "stage whose model this one starts from; empty: the language model before it")
    keep_last: int = knob(2, "newest checkpoints kept", least=1, most=10**6, affects_training=False)
    keep_every: int = knob(
        0, "checkpoints of every so many steps are kept for good; 0: none", least=0, most=10**9, affects_training=False
    )
    keep_moments: bool = knob(
        True,
        "keep the optimizer's moments (of ppo also the critic) when the stage is finished: without them its last checkpoint "
        "and those of keep_every have the model alone, the others are removed, and no steps can be added",
        affects_training=False,
    )
    trajectory_mb: int = knob(
        32,
        "MB of trajectory files (everything that the stage samples) kept, the newest; 0: none is written",
        least=0,
        most=10**9,
        affects_training=False,
    )
