"""TPU chips and GPUs that `lm plan` knows, with their rates and memory, and their topologies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.model.flops import peak_flops
from lm.parallel.topology import DEVICES_PER_CHIP, GPU_MEMORY, SHAPES, parse_slice

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU or GPU generation; rates are in FLOP/s, bytes/s and cycles/s.

    Sources for TPUs: peaks in lm/model/flops.py; HBM rates as in JAX's Pallas TPU table; the clock is the peak divided by the
    FLOPs of the matrix units per cycle, the unit of the compiler's `estimated_cycles`; `hbm_usable` is the available
    memory in libtpu 0.0.52's error for a program that does not fit; links are the maker's figures for one direction.
    Sources for GPUs: NVIDIA's data sheets of the SXM modules; `hbm_usable` is the memory that the driver shows times
    GPU_MEMORY, the share that JAX takes.
    """

    kind: str  # JAX's device_kind
    hbm_rate: float
    hbm_usable: int  # bytes that a program may use; the runtime uses the rest
    clock: float  # 0 for a GPU, whose compiler gives no cycles
    link_rate: float  # bytes/s of one inter-chip link in one direction
    links: int  # links of a chip that one large collective can use at once
    host_network: float  # bytes/s of a host's data-centre network connection in one direction
    devices_per_host: int
    sparse_gathers: bool  # whether the compiler runs gathers on SparseCore
    platform: str = "tpu"  # JAX's name of the platform

    @property
    def peak(self) -> float:
        """Peak dense bfloat16 FLOP/s of one device."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak

    @property
    def interconnect(self) -> float:
        """Bytes/s that a ring collective within a slice sends from one device."""
        return self.link_rate * self.links

    @property
    def network(self) -> float:
        """A device's share of its host's network connection, in bytes/s."""
        return self.host_network / self.devices_per_host


def _gpu(kind: str, hbm_rate: float, memory: float, links: int, host_network: float) -> Chip:
    """A GPU with `memory` GiB, NVLink connections of 25e9 bytes/s, and 8 of its kind in a host."""
    usable = int(memory * GPU_MEMORY * GIB)
    return Chip(kind, hbm_rate, usable, 0.0, 25e9, links, host_network, 8, False, platform="gpu")


CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5 lite", 8.2e11, int(15.75 * GIB), 1.5e9, 45e9, 4, 12.5e9, 4, False),
    "v5p": Chip("TPU v5", 2.46e12, int(95.73 * GIB), 1.75e9, 90e9, 6, 25e9, 4, True),
    "v6e": Chip("TPU v6 lite", 1.64e12, int(31.24 * GIB), 1.75e9, 90e9, 4, 50e9, 4, True),
    "tpu7x": Chip("TPU7x", 3.7e12, int(94.74 * GIB), 2.2e9, 90e9, 6, 50e9, 8, True),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 2.039e12, 79.3, 12, 200e9),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 3.35e12, 79.1, 18, 400e9),
    "h200": _gpu("NVIDIA H200", 4.8e12, 139.8, 18, 400e9),
}


@dataclass(frozen=True)
class Topology:
    """A number of slices (hosts with GPUs), each of `shape` chips."""

    chip_name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def name(self) -> str:
        """Name of one slice for the compiler and the command line, such as `v5p:2x4x4` or `h100:8`."""
        return f"{self.chip_name}:{'x'.join(map(str, self.shape))}"

    @property
    def slice_devices(self) -> int:
        return math.prod(self.shape) * DEVICES_PER_CHIP.get(self.chip_name, 1)

    @property
    def larger_shapes(self) -> tuple[str, ...]:
        """Larger slice shapes of the same chip."""
        shapes = SHAPES[self.chip_name]
        return shapes[shapes.index("x".join(map(str, self.shape))) + 1 :]

    @property
    def devices(self) -> int:
        return self.slice_devices * self.slices


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parse a topology such as `v5p:2x4x4` or `h100:8`.

    Raises:
        UserError: there is no such chip or slice shape; lists the valid ones.
    """
    chip_name, shape = parse_slice(name, CHIPS)
    return Topology(chip_name, tuple(map(int, shape.split("x"))), slices)
