"""TPU slices for launching: shapes, number of hosts, and their names in Google Cloud's tools."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.parallel.topology import DEVICES_PER_CHIP, parse_slice

ONE_HOST = {"1x1": 1, "1x1x1": 1, "2x4": 8}  # chips per host for shapes where it is not the usual four


@dataclass(frozen=True)
class Generation:
    """One TPU generation. Source: cloud.google.com/tpu/docs, pages of each version, of runtimes, and of TPUs in GKE."""

    label: str  # node label cloud.google.com/gke-tpu-accelerator in GKE
    prefix: str  # prefix of accelerator types such as v5p-64
    cores: int  # number that an accelerator type counts per chip
    runtime: str | None  # default software version of a TPU VM; None: available on GKE only


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x", 2, None),
}


@dataclass(frozen=True)
class SliceTopology:
    """One TPU slice: generation and shape in chips."""

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
        """Number of JAX devices (one per chip, except for tpu7x)."""
        return self.chips * DEVICES_PER_CHIP.get(self.kind, 1)

    @property
    def accelerator_type(self) -> str:
        """Accelerator type for `gcloud compute tpus`; its number counts cores or chips, depending on the generation."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


def parse_topology(name: str) -> SliceTopology:
    """Parse a slice such as `v5p:2x4x4`.

    Raises:
        UserError: there is no such generation or shape; lists the valid ones.
    """
    return SliceTopology(*parse_slice(name, GENERATIONS))
