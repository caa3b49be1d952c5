"""One stage of an experiment: objective, mixture of data, optimizer, steps, batches, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lm.config.field import knob
from lm.config.lora import LoRA
from lm.config.objectives import Objective

O_co = TypeVar("O_co", bound=Objective, covariant=True)


@dataclass(frozen=True)
class Optimizer:
    kind: Literal["adamw", "muon"] = knob(
        "adamw", "optimizer; muon: Muon for the matrices of the blocks, AdamW for all other parameters"
    )
    peak_lr: float = knob(1e-3, "peak learning rate, after the warmup", least=1e-12, most=1000)
    schedule: Literal["constant", "cosine", "wsd"] = knob(
        "cosine", "learning rate schedule after the warmup; wsd (warmup-stable-decay): constant, then a 1-sqrt decay"
    )
    warmup_steps: int = knob(
        20, "linear warmup, in optimizer updates; the first has peak_lr / warmup_steps; 0: none", least=0, most=10**9
    )
    decay_frac: float = knob(
        0.2, "schedule wsd: fraction of all updates in which the learning rate decays", least=0, most=1
    )
    final_lr_frac: float = knob(
        0.1, "final learning rate as a fraction of peak_lr, at the end of schedules cosine and wsd", least=0, most=1
    )
    b2: float = knob(0.95, "Adam's beta2, the decay rate of the second moment", least=0, most=0.99999)
    weight_decay: float = knob(
        0.1, "decoupled weight decay coefficient, of matrices only; 0 disables it", least=0, most=1000
    )
    state_dtype: Literal["float32", "bfloat16"] = knob(
        "float32", "dtype of the optimizer's moments, independent of model.param_dtype"
    )
    clip_norm: float = knob(1.0, "gradient clipping: maximum global norm of the gradient", least=1e-6, most=1e30)
    master_weights: bool = knob(
        True, "param_dtype bfloat16: update float32 master weights; without them rounding loses most updates"
    )


@dataclass(frozen=True)
class Source:
    path: str = knob(
        help="data of the source: a file, a folder of files, a data set's FOLDER or FOLDER/SPLIT, tfds:NAME/SPLIT, gen:NAME (built-in generator), gym:NAME (family of reasoning-gym) or collected:STAGE (rows of an earlier Collect stage); in an eval also stage:NAME, the source of that stage"
    )
    weight: float = knob(
        1.0, "relative weight of this source in the mixture of examples; 0: not trained on", least=0, most=1e9
    )
    holdout: float = knob(
        0.02, "fraction of rows held out of training, chosen by a hash of the prompt; 0: none, 1: all", least=0, most=1
    )
    columns: tuple[str, ...] = knob((), "columns to rename, each as EXPECTED=FOUND: prompt=query,completion=reply")
    bad_rows: Literal["stop", "drop"] = knob(
        "stop", "malformed rows and prompts that are too long: stop at the first one, or drop and count them"
    )


@dataclass(frozen=True)
class Stage(Generic[O_co]):
    name: str = knob(help="name of the stage and of its folder in the run", name=True)
    objective: O_co = knob(help="training objective and its settings")
    sources: tuple[Source, ...] = knob(help="data sources, mixed by weight")
    optimizer: Optimizer = Optimizer()
    steps: int = knob(
        1000,
        "number of steps: optimizer updates, rollouts with their updates (PPO, GRPO), or batches of prompts (Collect)",
        least=1,
        most=10**9,
    )
    batch_size: int = knob(
        32,
        "examples per step, over all devices: rows of packed tokens (pretraining, SFT), pairs, labelled answers or prompts",
        least=1,
        most=2**24,
    )
    seq_len: int = knob(256, "row length in tokens; at most model.max_len", least=2, most=2**26)
    microbatches: int = knob(
        1, "gradient accumulation: microbatches per batch; must divide its rows", least=1, most=2**24
    )
    trainable: tuple[str, ...] = knob(
        (),
        "globs of parameters to train: policy/*norm* only the norms, !policy/embed all but embeddings; empty: all; with lora.rank, of its factors and the heads",
    )
    lora: LoRA = LoRA()
    eval_every: int = knob(
        0, "steps between evaluations; 0: only before and after the stage", least=0, most=10**9, affects_training=False
    )
    evals: tuple[str, ...] = knob(
        (), "evals that also run every eval_every steps; empty: only samples of the prompts", affects_training=False
    )
    save_every: int = knob(100, "steps between checkpoints", least=1, most=10**9, affects_training=False)
    start: str = knob("", "earlier stage whose model this stage starts from; empty: the last one with a language model")
    keep_last: int = knob(2, "number of newest checkpoints to keep", least=1, most=10**6, affects_training=False)
    keep_every: int = knob(
        0, "keep checkpoints at multiples of this step for good; 0: none", least=0, most=10**9, affects_training=False
    )
    keep_moments: bool = knob(
        True,
        "keep the optimizer's moments (and PPO's critic) after the stage; false: the last checkpoint and those of keep_every keep only the model, the others are removed, and no steps can be added",
        affects_training=False,
    )
    trajectory_mb: int = knob(
        32,
        "maximum size in MB of the files of sampled trajectories, the newest of which are kept; 0: none are written",
        least=0,
        most=10**9,
        affects_training=False,
    )
