"""The TPUs that can be planned for: what a device can do, and the topologies there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.model.flops import peak_flops
from lm.parallel.topology import DEVICES_PER_CHIP, SHAPES, parse_slice

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device of a kind of TPU; rates are in FLOP/s, bytes/s and cycles/s.

    Sources: peaks in lm/model/flops.py; HBM rates as in JAX's Pallas TPU table; the clock is the peak over what the
    matrix units do in a cycle, which is what the compiler's `estimated_cycles` count; `hbm_usable` is what libtpu 0.0.52
    says is available when a program does not fit; links are the makers' figures for one direction.
    """

    kind: str  # JAX's device_kind
    hbm_rate: float
    hbm_usable: int  # bytes that a program may use; the rest is the runtime's
    clock: float
    link_rate: float  # of one inter-chip link, one way
    links: int  # links of a chip that one large collective can use at once
    host_network: float  # of a host's connection to the data-centre network, one way
    devices_per_host: int
    sparse_gathers: bool  # the compiler gives gathers to SparseCore

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak

    @property
    def interconnect(self) -> float:
        """Bytes/s that a ring collective over the slice moves out of one device."""
        return self.link_rate * self.links

    @property
    def network(self) -> float:
        """A device's share of its host's connection, in bytes/s."""
        return self.host_network / self.devices_per_host


CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5 lite", 8.2e11, int(15.75 * GIB), 1.5e9, 45e9, 4, 12.5e9, 4, False),
    "v5p": Chip("TPU v5", 2.46e12, int(95.73 * GIB), 1.75e9, 90e9, 6, 25e9, 4, True),
    "v6e": Chip("TPU v6 lite", 1.64e12, int(31.24 * GIB), 1.75e9, 90e9, 4, 50e9, 4, True),
    "tpu7x": Chip("TPU7x", 3.7e12, int(94.74 * GIB), 2.2e9, 90e9, 6, 50e9, 8, True),
}


@dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips each."""

    chip_name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def name(self) -> str:
        """As the compiler and the command line call one slice."""
        return f"{self.chip_name}:{'x'.join(map(str, self.shape))}"

    @property
    def slice_devices(self) -> int:
        return math.prod(self.shape) * DEVICES_PER_CHIP[self.chip_name]

    @property
    def larger_shapes(self) -> tuple[str, ...]:
        """Those of the same chip that come after this one."""
        shapes = SHAPES[self.chip_name]
        return shapes[shapes.index("x".join(map(str, self.shape))) + 1 :]

    @property
    def devices(self) -> int:
        return self.slice_devices * self.slices


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The topology that the command line calls `v5p:2x4x4`.

    Raises:
        UserError: no such chip, or no slice of this shape; shows those that there are.
    """
    chip_name, shape = parse_slice(name, CHIPS)
    return Topology(chip_name, tuple(map(int, shape.split("x"))), slices)
