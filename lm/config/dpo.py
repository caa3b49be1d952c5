"""Config of the DPO family: preference pairs, with a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm.config.field import UserError, knob
from lm.config.model import Model
from lm.config.objective import PAIR_CHARTS, ObjectiveConfig, check_label_smoothing, check_read_with

if TYPE_CHECKING:
    from lm.config.stage import Stage

READS_LABEL_SMOOTHING = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"})
RANKS_BATCH = frozenset({"aot", "aot_unpaired"})  # a pair's loss depends on the other pairs of the batch

DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "bco_pair", "aot", "aot_unpaired", "sft", "FILE:FUNCTION",
]  # fmt: skip


@dataclass(frozen=True)
class DPO(ObjectiveConfig):
    losses: tuple[DPOLoss, ...] = knob(
        ("sigmoid",), "losses of the DPO family, or FILE:FUNCTION of your own; several are summed, as in MPO"
    )
    loss_weights: tuple[float, ...] = knob((), "weight of each loss in `losses`; empty: 1 each", least=0, most=1e6)
    beta: float = knob(
        0.1, "scale of the implicit reward; larger keeps the policy closer to the reference", least=1e-6, most=100
    )
    label_smoothing: float = knob(
        0.0, "label smoothing: assumed fraction of flipped preferences; 0 disables it", least=0, below=0.5
    )
    tau: float = knob(0.05, "loss discopop: temperature of its blend", least=1e-3, most=1000)
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = knob(
        "reverse_kl", "f-divergence between policy and reference"
    )
    alpha: float = knob(0.5, "divergence alpha_divergence: its order; 1: reverse KL", least=-10, most=10)
    ld_alpha: float = knob(
        1.0, "LD-DPO: weight of the longer answer's tokens beyond the shorter's length; 1 disables it", least=0, most=1
    )
    reference: Literal["step", "cached"] = knob(
        "step", "reference log-probabilities: computed in every step, or cached before the first, which saves memory"
    )
    weighting: bool = knob(False, "WPO: weight each pair by the probability of its answers under the policy")

    data = "pairs"
    learns_preferences = True
    functions: ClassVar = {"losses": "chosen, rejected, knobs"}
    caption = "is trained on pairs of answers to prefer the chosen one."
    charts = PAIR_CHARTS

    @property
    def caches_reference(self) -> bool:
        return self.reference == "cached"

    def check(self, stage: Stage, model: Model) -> None:
        where = f"{stage.name}.objective"
        check_read_with(where, self, {"tau": ("losses", ("discopop",))})
        check_label_smoothing(where, self.label_smoothing, self.losses, READS_LABEL_SMOOTHING)
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise UserError(
                f"{where}.losses is {list(self.losses)}; it should have at least one loss, and each only once"
            )
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise UserError(
                f"{where}.loss_weights has {len(self.loss_weights)} numbers and {where}.losses {len(self.losses)} losses; "
                "loss_weights should have one number for each loss, or be empty"
            )
        if self.loss_weights and not any(self.loss_weights):
            raise UserError(f"{where}.loss_weights is {list(self.loss_weights)}; at least one should be above 0")
        ranked = sorted(RANKS_BATCH.intersection(self.losses))
        if ranked and stage.microbatches > 1:
            raise UserError(
                f"{stage.name}.microbatches is {stage.microbatches} and {where}.losses has {ranked[0]}, which ranks all pairs of "
                "a batch: microbatches should be 1, or the loss another"
            )
