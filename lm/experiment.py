"""An experiment is a value: frozen dataclasses, loaded from a file, overridden by name, saved, compared.

Imports nothing of lm but fields, and nothing slow, so that `lm --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from lm.config.field import FUNCTION as FUNCTION
from lm.config.field import Reading, knob, nearest, read
from lm.config.field import UserError as UserError
from lm.config.field import describe as describe
from lm.config.field import diff as diff
from lm.config.field import flatten as flatten
from lm.config.field import takes_function as takes_function
from lm.config.model import Mesh as Mesh
from lm.config.model import Model as Model
from lm.config.model import Tokenizer as Tokenizer


@dataclass(frozen=True)
class Optimizer:
    kind: Literal["adamw", "muon"] = knob(
        "adamw", "rule of the update; muon: for the matrices of the blocks, else adamw"
    )
    peak_lr: float = knob(1e-3, "learning rate after the warmup", least=1e-12, most=1000)
    schedule: Literal["constant", "cosine", "wsd"] = knob("cosine", "shape of the learning rate after the warmup")
    warmup_steps: int = knob(
        20, "updates of linear warmup; the first update has peak_lr / warmup_steps", least=0, most=10**9
    )
    decay_frac: float = knob(0.2, "part of the updates that wsd spends decaying", least=0, most=1)
    final_lr_frac: float = knob(0.1, "last learning rate as a part of the peak", least=0, most=1)
    b2: float = knob(0.95, "AdamW decay of the second moment", least=0, most=0.99999)
    weight_decay: float = knob(0.1, "decoupled weight decay, on matrices only", least=0, most=1000)
    state_dtype: Literal["float32", "bfloat16"] = knob(
        "float32", "dtype the moments are kept in, whatever the dtype of the parameters"
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
        help="file, folder of files, tfds:NAME/SPLIT, gen:NAME, made:STAGE of collect; of an eval also stage:NAME, that stage's"
    )
    weight: float = knob(1.0, "share of this source in the mixture; 0: not trained on", least=0, most=1e9)
    holdout: float = knob(
        0.02,
        "part of the rows kept out of training, chosen by a hash of what they ask; 0: none, 1: all",
        least=0,
        most=1,
    )
    columns: tuple[str, ...] = knob((), "columns under other names, as ours=theirs: prompt=query,completion=reply")
    bad_rows: Literal["stop", "drop"] = knob("stop", "broken rows and prompts too long: stop at one, or drop and count")


@dataclass(frozen=True)
class Pretrain:
    z_loss: float = knob(0.0, "weight of the squared log-normaliser", least=0, most=1000)


@dataclass(frozen=True)
class SFT:
    z_loss: float = knob(0.0, "weight of the squared log-normaliser", least=0, most=1000)
    loss_on: Literal["answers", "all"] = knob("answers", "tokens the loss covers: assistant turns only, or all")
    learn_end: bool = knob(True, "the loss also covers the token that ends a turn")


DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "bco_pair", "aot", "aot_unpaired", "sft", "FILE:FUNCTION",
]  # fmt: skip


@dataclass(frozen=True)
class DPO:
    losses: tuple[DPOLoss, ...] = knob(
        ("sigmoid",), "rows of the DPO table, or functions of your own; several are added up, as in MPO"
    )
    loss_weights: tuple[float, ...] = knob((), "weight of each of losses; empty: 1 each", least=0, most=1e6)
    beta: float = knob(
        0.1,
        "scale of the implicit reward; the larger, the closer the policy stays to the reference",
        least=1e-6,
        most=100,
    )
    label_smoothing: float = knob(0.0, "label smoothing: assumed fraction of flipped preferences", least=0, below=0.5)
    tau: float = knob(0.05, "temperature of discopop's blend", least=1e-3, most=1000)
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = knob(
        "reverse_kl", "f-divergence between policy and reference"
    )
    alpha: float = knob(0.5, "of alpha_divergence; 1 is reverse_kl", least=-10, most=10)
    ld_alpha: float = knob(
        1.0, "LD-DPO: weight of an answer's tokens beyond the length of its partner", least=0, most=1
    )
    reference: Literal["step", "cached"] = knob(
        "step",
        "log-probabilities of the reference: computed in every step, or once before the first step, so that the reference needs no memory",
    )
    weighting: bool = knob(False, "WPO: weight each pair by the probability of its answers under the policy")


@dataclass(frozen=True)
class CPO:
    """Pairs without a reference: CPO, SimPO (`simpo`, nll_coef 0), CPO-SimPO, AlphaPO (`simpo` with an alpha)."""

    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "FILE:FUNCTION"] = knob(
        "sigmoid", "row of the CPO table, or a function of your own"
    )
    beta: float = knob(
        0.1, "scale of the rewards; 2 and more for simpo, whose rewards are a token's mean", least=1e-6, most=100
    )
    label_smoothing: float = knob(
        0.0, "label smoothing: assumed fraction of flipped preferences; sigmoid and simpo", least=0, below=0.5
    )
    gamma: float = knob(
        0.5, "simpo: target margin between the rewards of chosen and rejected answer, after beta", least=0, most=1000
    )
    alpha: float = knob(0.0, "AlphaPO: shape of simpo's reward; 0: the log-probability", least=-10, most=10)
    nll_coef: float = knob(1.0, "weight of cross-entropy on the chosen answers", least=0, most=1000)


@dataclass(frozen=True)
class ORPO:
    beta: float = knob(0.1, "weight of the odds-ratio term, added to cross-entropy", least=0, most=1000)


@dataclass(frozen=True)
class KTO:
    loss: Literal["kto", "apo_zero_unpaired", "FILE:FUNCTION"] = knob(
        "kto", "row of the KTO table, or a function of your own"
    )
    beta: float = knob(
        0.1,
        "scale of the implicit reward; the larger, the closer the policy stays to the reference",
        least=1e-6,
        most=100,
    )
    desirable_weight: float = knob(1.0, "weight of answers that are desirable", least=0, most=1e6)
    undesirable_weight: float = knob(1.0, "weight of answers that are not", least=0, most=1e6)


def _reward_seconds() -> Any:
    """The field that limits the time of a reward."""
    text = "seconds that the verifier may take for one completion; then it is stopped, and the reward is 0"
    return knob(10.0, text, above=0, most=10**6)


@dataclass(frozen=True)
class GRPO:
    verifier: str = knob(
        "answer", "verifier that gives the reward: answer, manners, helpful, or FILE:FUNCTION of your own"
    )
    group_size: int = knob(8, "completions sampled for one prompt", least=2, most=2**16)
    max_new_tokens: int = knob(64, "longest completion; the prompt gets seq_len less this", least=1, most=2**26)
    temperature: float = knob(1.0, "sampling temperature, in the log-probabilities too", least=0.01, most=100)
    clip_low: float = knob(0.2, "lower clip of the ratio: 1 - clip_low", least=1e-4, most=1)
    clip_high: float = knob(0.2, "upper clip of the ratio: 1 + clip_high", least=1e-4, most=1e6)
    kl_coef: float = knob(
        0.0, "KL penalty coefficient (k3, to the model before this stage); 0 disables it", least=0, most=1000
    )
    aggregation: Literal["token", "sequence", "constant"] = knob(
        "token", "aggregation of token losses, as in DAPO, GRPO, Dr. GRPO"
    )
    scale_advantages: bool = knob(True, "divide advantages by the group's standard deviation")
    updates_per_rollout: int = knob(1, "optimizer updates that share one rollout", least=1, most=2**16)
    rollouts: int = knob(
        1,
        "most rollouts in a step, sampled until the batch is full of groups with unequal rewards (DAPO's dynamic sampling)",
        least=1,
        most=2**16,
    )
    sampler: Literal["same", "bfloat16", "int8", "int4"] = knob(
        "same", "weights of the sampler: the trained ones, or quantised as in an inference engine"
    )
    sampler_cap: float = knob(
        0.0,
        "importance correction (TIS) of what sampler and trainer differ by, rounding too: tokens are weighed by how much "
        "likelier they are to the trainer, at most this; 2 is usual; 0: none",
        least=1e-3,
        most=1e6,
        special=0,
    )
    reward_seconds: float = _reward_seconds()


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry reward model on pairs: a scalar head replaces the language-model head."""

    margins: bool = knob(False, "require the scores of a pair to differ by its `margin`")
    center_coef: float = knob(
        0.0, "weight of the squared sum of a pair's two scores, which keeps their mean at 0", least=0, most=1000
    )
    ties: Literal["drop", "split", "rao_kupper"] = knob(
        "drop", "pairs that are a `tie`: left out, half each, a third outcome"
    )
    tie_width: float = knob(
        0.5, "rao_kupper: answers whose scores differ by less are called equal", least=1e-3, most=1000
    )
    layers: int = knob(
        0,
        "layers of the reward model, the first of the language model; 0: all",
        least=0,
        most=2**14,
    )


@dataclass(frozen=True)
class PPO:
    reward_models: tuple[str, ...] = knob(
        (), "stages whose models score the answers, as NAME, or RUN:NAME of another run; empty: the verifier does"
    )
    ensemble: Literal["mean", "min"] = knob("mean", "how the scores of several reward models are combined")
    verifier: str = knob(
        "",
        "verifier, or FILE:FUNCTION of your own: the reward where no reward model is named, else only logged; empty: none",
    )
    critic: Literal["separate", "head"] = knob(
        "separate", "critic: a separate model (from the first reward model, or this one), or a value head on the policy"
    )
    max_new_tokens: int = knob(64, "longest answer; the prompt gets seq_len less this", least=1, most=2**26)
    temperature: float = knob(1.0, "sampling temperature, in the log-probabilities too", least=0.01, most=100)
    kl_coef: float = knob(
        0.05, "weight, inside the reward, of each token's KL to the model before this stage", least=0, most=1000
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k1", "estimator of that KL")
    kl_target: float = knob(
        0.0, "kl_coef follows an answer's mean KL to this, in nats; 0: kl_coef is fixed", least=0, most=1000
    )
    kl_horizon: int = knob(10_000, "answers over which kl_coef adapts", least=1, most=10**9)
    gamma: float = knob(1.0, "discount of a token", least=0, most=1)
    lam: float = knob(0.95, "λ of generalised advantage estimation", least=0, most=1)
    whiten_rewards: bool = knob(False, "divide rewards by their standard deviation over the rollout")
    missing_eos_penalty: float = knob(
        0.0, "taken off the score of an answer that did not end by itself", least=0, most=1e6
    )
    clip: float = knob(0.2, "ratios are clipped to 1 ± clip", least=1e-4, most=1e6)
    value_clip: float = knob(0.2, "values are clipped to the rollout's ± value_clip", least=1e-4, most=1e6)
    value_coef: float = knob(0.1, "weight of the value loss", least=0, most=1000)
    epochs: int = knob(4, "epochs over each rollout", least=1, most=2**16)
    minibatches: int = knob(1, "minibatches in an epoch, an optimizer update each", least=1, most=2**16)
    reward_seconds: float = _reward_seconds()
    sampler_cap: float = knob(
        0.0,
        "importance correction (TIS) of what sampler and trainer differ by, of rounding: tokens are weighed by how much "
        "likelier they are to the trainer, at most this; 2 is usual; 0: none",
        least=1e-3,
        most=1e6,
        special=0,
    )


@dataclass(frozen=True)
class Collect:
    """Trains nothing: samples answers, has them judged, and writes the rows that later stages read as the source `made:STAGE`."""

    judge: str = knob(
        "", "stage of a reward model, as NAME or RUN:NAME; or `people`, on the label page; empty: the verifier"
    )
    verifier: str = knob("", "verifier (or FILE:FUNCTION of your own) that judges where judge is empty")
    make: Literal["pairs", "best"] = knob(
        "pairs", "preference pairs of every two answers, or conversations with the best one"
    )
    answers: int = knob(2, "sampled for each prompt", least=2, most=2**16)
    max_new_tokens: int = knob(64, "longest answer; the prompt gets seq_len less this", least=1, most=2**26)
    temperature: float = knob(1.0, "sampling temperature", least=0.01, most=100)
    reward_seconds: float = _reward_seconds()


Objective = Pretrain | SFT | DPO | CPO | ORPO | KTO | GRPO | RewardModel | PPO | Collect
Paired = DPO | CPO | ORPO | RewardModel  # learn from pairs: a chosen answer in one row, the rejected one in the next
Preference = DPO | CPO | ORPO | KTO | PPO  # the policy learns what people prefer
Sampled = GRPO | PPO  # learn from what the model itself answers
Speechless = RewardModel | Collect  # leave no language model behind: a later stage starts from the one before them


@dataclass(frozen=True)
class Stage:
    name: str = knob(help="name of the stage, and of its folder", name=True)
    objective: Objective = knob(help="what is minimised")
    sources: tuple[Source, ...] = knob(help="the mixture of data")
    optimizer: Optimizer = Optimizer()
    steps: int = knob(
        1000,
        "steps; one of grpo and ppo is a rollout with its updates, one of collect a batch of prompts",
        least=1,
        most=10**9,
    )
    batch_size: int = knob(
        32,
        "rows (pretrain, sft), pairs (dpo, cpo, orpo, reward model), answers (kto) or prompts (grpo, ppo, collect) in a "
        "step, over all devices",
        least=1,
        most=2**24,
    )
    seq_len: int = knob(256, "tokens in a row", least=2, most=2**26)
    microbatches: int = knob(1, "pieces that a batch is cut into to save memory", least=1, most=2**24)
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


@dataclass(frozen=True)
class Eval:
    name: str = knob(help="name of the column in tables", name=True)
    source: Source = knob(help="where the held-out examples come from")
    metric: Literal["bits_per_byte", "reward", "pair_accuracy", "best_of_n", "pass_at_k"] = knob(
        "reward", "what is measured"
    )
    verifier: str = knob(
        "answer", "verifier, or FILE:FUNCTION of your own, of the metrics reward, best_of_n and pass_at_k"
    )
    count: int = knob(200, "held-out examples (bits_per_byte of documents: rows of tokens)", least=1, most=10**9)
    max_new_tokens: int = knob(64, "longest answer", least=1, most=2**26)
    temperature: float = knob(0.0, "sampling temperature of the answers; 0 is greedy", least=0.01, most=100, special=0)
    best_of: int = knob(16, "answers sampled for each prompt, for metrics best_of_n and pass_at_k", least=1, most=2**16)
    reward_seconds: float = _reward_seconds()


@dataclass(frozen=True)
class Experiment:
    name: str = knob(help="name of the run; its folder is runs/NAME", name=True, affects_training=False)
    stages: tuple[Stage, ...] = knob(help="stages, one after another")
    evals: tuple[Eval, ...] = knob(
        (), "held-out measurements taken before and after every stage", affects_training=False
    )
    prompts: tuple[str, ...] = knob(
        ("What is an LLM?",), "prompts answered on every evaluation", affects_training=False
    )
    seed: int = knob(0, "seed of parameters, data order and samples", least=0, most=2**32 - 1)
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    mesh: Mesh = knob(Mesh(), affects_training=False)


MADE = "made:"
"""How the path of a source begins whose rows an earlier stage of Collect writes; its name follows."""

OBJECTIVES = {kind.__name__: kind for kind in typing.get_args(Objective)}


def rows_per_update(stage: Stage) -> int:
    """Rows of tokens in one optimizer update, over all devices."""
    o = stage.objective
    if isinstance(o, GRPO):
        return stage.batch_size * o.group_size // o.updates_per_rollout
    if isinstance(o, PPO):
        return stage.batch_size // o.minibatches
    return stage.batch_size * rows_together(stage)


def corrects_sampler(o: Sampled) -> bool:
    """Whether the old policy of a rollout is the trainer's, with the sampler's log-probabilities kept beside it."""
    return o.sampler_cap > 0 or (isinstance(o, GRPO) and o.sampler != "same")


def updates_per_step(stage: Stage) -> int:
    """Optimizer updates in one step of the loop: several only where they share a rollout."""
    o = stage.objective
    if isinstance(o, PPO):
        return o.epochs * o.minibatches
    return o.updates_per_rollout if isinstance(o, GRPO) else 1


def start_of(experiment: Experiment, index: int) -> int | None:
    """The stage whose model enters stage `index`: its `start`, else the nearest before that leaves a language model."""
    earlier = list(enumerate(experiment.stages[:index]))
    name = experiment.stages[index].start
    speaks = [i for i, s in earlier if not isinstance(s.objective, Speechless) and name in ("", s.name)]
    return speaks[-1] if speaks else None


def reward_names(stage: Stage) -> tuple[str, ...]:
    """The reward models that a stage reads, as NAME or RUN:NAME."""
    o = stage.objective
    if isinstance(o, Collect):
        return (o.judge,) if o.judge not in ("", "people") else ()
    return o.reward_models if isinstance(o, PPO) else ()


def rows_together(stage: Stage) -> int:
    """Rows that no microbatch may part: the two of a pair."""
    return 2 if isinstance(stage.objective, Paired) else 1


# ---- to and from plain JSON values -------------------------------------------------------------------------------


def to_dict(value: Any) -> Any:
    """Plain JSON value of an experiment; an objective carries its class name as `kind`."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields} if type(value) in OBJECTIVES.values() else fields
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def from_dict(value: Any, kind: Any = Experiment, where: str = "") -> Any:
    """The typed value that `to_dict` made plain; absent fields have their defaults.

    Raises:
        UserError: a field is missing, unknown, of the wrong type or out of its range; says which.
    """
    return read(value, kind, where, Reading(plain=True, names=False))


def strict(experiment: Any) -> Experiment:
    """An experiment built in Python, read as strictly as one from JSON: lists become tuples, numpy's scalars numbers.

    Raises:
        UserError: a leaf is of the wrong type or out of its range, or a name is none; says which.
    """
    return read(experiment, Experiment, "", Reading(plain=False, names=True))


def resolve_sources(experiment: Experiment) -> Experiment:
    """The experiment with every eval's `stage:NAME` (or `stage:NAME.2`) replaced by that stage's first (or third) source.

    Raises:
        UserError: there is no such stage, or no such source of it.
    """
    known = {
        name: source
        for stage in experiment.stages
        for number, source in enumerate(stage.sources)
        for name in ((f"stage:{stage.name}",) if number == 0 else ()) + (f"stage:{stage.name}.{number}",)
    }

    def resolved(item: Eval) -> Eval:
        path = item.source.path
        if path.startswith("stage:") and path not in known:
            raise UserError(f"evals.{item.name}.source.path is {path!r}{nearest(path, known)}")
        return dataclasses.replace(item, source=known.get(path, item.source))

    return dataclasses.replace(experiment, evals=tuple(map(resolved, experiment.evals)))
