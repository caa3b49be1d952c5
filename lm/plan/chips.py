"""TPU chips that `lm plan` knows, with their rates and memory, and their topologies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.model.flops import peak_flops
from lm.parallel.topology import DEVICES_PER_CHIP, SHAPES, parse_slice

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation; rates are in FLOP/s, bytes/s and cycles/s.

    Sources: peaks in lm/model/flops.py; HBM rates as in JAX's Pallas TPU table; the clock is the peak divided by the
    FLOPs of the matrix units per cycle, the unit of the compiler's `estimated_cycles`; `hbm_usable` is the available
    memory in libtpu 0.0.52's error for a program that does not fit; links are the maker's figures for one direction.
    """

    kind: str  # JAX's device_kind
    hbm_rate: float
    hbm_usable: int  # bytes that a program may use; the runtime uses the rest
    clock: float
    link_rate: float  # bytes/s of one inter-chip link in one direction
    links: int  # links of a chip that one large collective can use at once
    host_network: float  # bytes/s of a host's data-centre network connection in one direction
    devices_per_host: int
    sparse_gathers: bool  # whether the compiler runs gathers on SparseCore

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


CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5 lite", 8.2e11, int(15.75 * GIB), 1.5e9, 45e9, 4, 12.5e9, 4, False),
    "v5p": Chip("TPU v5", 2.46e12, int(95.73 * GIB), 1.75e9, 90e9, 6, 25e9, 4, True),
    "v6e": Chip("TPU v6 lite", 1.64e12, int(31.24 * GIB), 1.75e9, 90e9, 4, 50e9, 4, True),
    "tpu7x": Chip("TPU7x", 3.7e12, int(94.74 * GIB), 2.2e9, 90e9, 6, 50e9, 8, True),
}


@dataclass(frozen=True)
class Topology:
    """A number of slices, each of `shape` chips."""

    chip_name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def name(self) -> str:
        """Name of one slice for the compiler and the command line, such as `v5p:2x4x4`."""
        return f"{self.chip_name}:{'x'.join(map(str, self.shape))}"

    @property
    def slice_devices(self) -> int:
        return math.prod(self.shape) * DEVICES_PER_CHIP[self.chip_name]

    @property
    def larger_shapes(self) -> tuple[str, ...]:
        """Larger slice shapes of the same chip."""
        shapes = SHAPES[self.chip_name]
        return shapes[shapes.index("x".join(map(str, self.shape))) + 1 :]

    @property
    def devices(self) -> int:
        return self.slice_devices * self.slices


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parse a topology such as `v5p:2x4x4`.

    Raises:
        UserError: there is no such chip or slice shape; lists the valid ones.
    """
    chip_name, shape = parse_slice(name, CHIPS)
    return Topology(chip_name, tuple(map(int, shape.split("x"))), slices)
