"""Config of LoRA: low-rank factors that are added to the matrices of a stage's models and trained instead of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lm.config.field import knob


@dataclass(frozen=True)
class LoRA:
    rank: int = knob(
        0,
        "rank of the adapter (LoRA), whose factors train instead of the weights; 0: none, full weights",
        least=0,
        most=2**16,
    )
    alpha: float = knob(32.0, "scale of the adapter: its product is multiplied by alpha / rank", least=1e-6, most=1e6)
    targets: tuple[str, ...] = knob(
        (), "globs of the linear layers that get factors: blocks/attention/[qv], *mlp*; empty: all of the blocks"
    )
    rs_lora: bool = knob(False, "rank-stabilised scale, alpha / √rank")
    dora: bool = knob(False, "DoRA: train the norm of each column of a weight separately from its direction")
    base: Literal["model", "bfloat16", "int8", "nf4"] = knob(
        "model",
        "storage of the blocks' frozen weights: model (model.param_dtype), bfloat16, or quantised to 8 bits (int8) or 4 bits (nf4)",
    )
    merge_for_sampling: bool = knob(
        False,
        "merge the factors into the sampler's weights, once per rollout: faster, but one more copy and different rounding",
    )

    @property
    def scale(self) -> float:
        """Multiplier of the product of the factors: α/r, or α/√r (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rs_lora else self.rank)
