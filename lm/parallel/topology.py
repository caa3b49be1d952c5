"""Table of TPU slices and GPU hosts by chip name and shape, and the number of JAX devices per chip."""

from __future__ import annotations

from collections.abc import Iterable

from lm.experiment import UserError, nearest

TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TORUS_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

GPU_HOST = ("1", "2", "4", "8")

SHAPES: dict[str, tuple[str, ...]] = {
    "v4": TORUS_3D,
    "v5e": TORUS_2D,
    "v5p": TORUS_3D,
    "v6e": TORUS_2D,
    "tpu7x": ("1x1x1", *TORUS_3D),
    "a100": GPU_HOST,
    "h100": GPU_HOST,
    "h200": GPU_HOST,
}
GPU_MEMORY = 0.92  # share of a GPU's memory that JAX takes at the start, by lm/cli/main.py; its own default is 0.75
DEVICES_PER_CHIP = {"tpu7x": 2}  # of the other chips 1


def parse_slice(name: str, chips: Iterable[str] = SHAPES) -> tuple[str, str]:
    """Parse `v5p:2x4x4` into ("v5p", "2x4x4").

    Args:
        chips: the known chips.
    Raises:
        UserError: there is no such chip, or no slice of this shape; lists what exists.
    """
    chips = tuple(chips)
    chip, _, shape = name.partition(":")
    if chip not in chips:
        hint = nearest(chip, chips)
        raise UserError(f"--topology {name!r}: no chip {chip!r}; there are {', '.join(chips)} (v5p:2x4x4){hint}")
    if shape not in SHAPES[chip]:
        raise UserError(f"--topology {name!r}: {chip} has no shape {shape!r}; there are {', '.join(SHAPES[chip])}")
    return chip, shape
