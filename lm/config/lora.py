"""Config of LoRA: low-rank factors beside the matrices of a stage's models, which train instead of these."""

from __future__ import annotations

from dataclasses import dataclass

from lm.config.field import knob


@dataclass(frozen=True)
class LoRA:
    rank: int = knob(
        0,
        "rank of the adapter (LoRA), whose factors train instead of the weights; 0: none, full weights",
        least=0,
        most=2**16,
    )
    alpha: float = knob(32.0, "scale of the adapter: its product counts alpha / rank times", least=1e-6, most=1e6)
    targets: tuple[str, ...] = knob(
        (), "globs of the linear layers that get factors: blocks/attention/[qv], *mlp*; empty: all of the blocks"
    )
    rs_lora: bool = knob(False, "rank-stabilised scale, alpha / √rank")
    dora: bool = knob(False, "DoRA: train the norm of each column of a weight apart from its direction")
    merge_for_sampling: bool = knob(
        False, "sample from weights with the factors merged in, once a rollout: faster, one more copy, other rounding"
    )

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by: α/r, or α/√r (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rs_lora else self.rank)
