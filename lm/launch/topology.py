"""How slices of TPUs are asked for: their shapes, hosts, and the names that Google's tools have for them."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from lm.experiment import UserError

TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TORUS_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
ONE_HOST = {"1x1": 1, "1x1x1": 1, "2x4": 8}  # chips of the host, where they are not the usual four


@dataclass(frozen=True)
class Generation:
    """One kind of TPU. Source: cloud.google.com/tpu/docs, pages of each version, of runtimes, and of TPUs in GKE."""

    label: str  # of GKE's nodes: cloud.google.com/gke-tpu-accelerator
    prefix: str  # of an accelerator type: v5p-64
    cores: int  # that an accelerator type counts for a chip
    devices: int  # of JAX for a chip
    runtime: str | None  # software of a TPU VM; None: GKE only
    shapes: tuple[str, ...]


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, 1, "tpu-ubuntu2204-base", TORUS_3D),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, 1, "v2-alpha-tpuv5-lite", TORUS_2D),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, 1, "v2-alpha-tpuv5", TORUS_3D),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, 1, "v2-alpha-tpuv6e", TORUS_2D),
    "tpu7x": Generation("tpu7x", "tpu7x", 2, 2, None, ("1x1x1", *TORUS_3D)),
}


@dataclass(frozen=True)
class Topology:
    """One slice."""

    kind: str
    shape: str

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        return ONE_HOST.get(self.shape, 4)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """JAX devices: of every generation but the last a chip is one."""
        return self.chips * self.generation.devices

    @property
    def accelerator_type(self) -> str:
        """As `gcloud compute tpus` calls it: the number is of cores or of chips, which depends on the generation."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


def parse_topology(name: str) -> Topology:
    """The slice that the command line calls `v5p:2x4x4`.

    Raises:
        UserError: there is no such kind, or none of that shape; shows those that there are.
    """
    kind, _, shape = name.partition(":")
    if kind not in GENERATIONS:
        close = difflib.get_close_matches(kind, GENERATIONS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--topology {name!r}: no TPU {kind!r}; there are {', '.join(GENERATIONS)} (v5p:2x4x4){hint}")
    if shape not in GENERATIONS[kind].shapes:
        shapes = ", ".join(GENERATIONS[kind].shapes)
        raise UserError(f"--topology {name!r}: {kind} has no slice {shape!r}; there are {shapes}")
    return Topology(kind, shape)
