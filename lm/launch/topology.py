"""How slices of TPUs are asked for: their shapes, hosts, and the names that Google's tools have for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.parallel.topology import DEVICES_PER_CHIP, parse_slice

ONE_HOST = {"1x1": 1, "1x1x1": 1, "2x4": 8}  # chips of the host, where they are not the usual four


@dataclass(frozen=True)
class Generation:
    """One kind of TPU. Source: cloud.google.com/tpu/docs, pages of each version, of runtimes, and of TPUs in GKE."""

    label: str  # of GKE's nodes: cloud.google.com/gke-tpu-accelerator
    prefix: str  # of an accelerator type: v5p-64
    cores: int  # that an accelerator type counts for a chip
    runtime: str | None  # software of a TPU VM; None: GKE only


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x", 2, None),
}


@dataclass(frozen=True)
class SliceTopology:
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
        return self.chips * DEVICES_PER_CHIP[self.kind]

    @property
    def accelerator_type(self) -> str:
        """As `gcloud compute tpus` calls it: the number is of cores or of chips, which depends on the generation."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


def parse_topology(name: str) -> SliceTopology:
    """The slice that the command line calls `v5p:2x4x4`.

    Raises:
        UserError: there is no such kind, or none of that shape; shows those that there are.
    """
    return SliceTopology(*parse_slice(name, GENERATIONS))
