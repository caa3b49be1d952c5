"""Step time of a compiled TPU module, estimated from its text: the compiler's cycle counts, and a model of the rest.

The TPU compiler annotates most instructions with `estimated_cycles`, but not collectives and kernels. Each instruction of
the scheduled computations (entry, loop bodies times their trip counts, the slowest branch) falls into one category:

    compute   cycles / clock
    kernel    splash attention: executed FLOPs / (KERNEL_EFFICIENCY · peak); other kernels count as 0 and are listed
    sync      blocking collectives: bytes on a ring over all links of the chip
    async     overlapping collectives: the same, in a queue of their own
    host      copies to and from host memory, in a queue of their own
    network   transfers between slices over the data-centre network, in a queue of their own, counted as an all-reduce
    unpriced  other instructions without a cycle count: bytes / HBM rate (of gathers and scatters in place, of the rows that they
              touch), or FLOPs / peak if that is longer

Copies inside the chip, including gathers on SparseCore, overlap the rest and count as 0.

`schedule_s` simulates the instructions in scheduled order with a queue each for compute, links, host and network. Use it
to compare modules of the same compiler and chip. `bound_s` is the busiest queue by itself (perfect overlap).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from lm.plan.chips import Chip
from lm.plan.hlo_loops import trip_count
from lm.plan.hlo_text import Instruction, Module
from lm.plan.hlo_work import (
    Work,
    collective_kind,
    group_size,
    host_bytes,
    payload,
    rendezvous,
    wire_seconds,
)
from lm.plan.kernels import HOST_RATE, KERNEL_EFFICIENCY, RING

SMALL = 4096  # bytes: results up to this size stay in registers or scalar memory

FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
     "replica-id", "add-dependency", "get-dimension-size", "rng-get-and-update-state")
)  # fmt: skip
FREE_CALLS = frozenset(
    ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AsyncCollectiveStart",
     "AsyncCollectiveDone", "PinnedBuffer", "Pin", "Unpin", "CreateBuffer", "annotate_device_placement", "MoveToHost",
     "MoveToDevice")
)  # fmt: skip
COPIES = frozenset(("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start", "async-start"))


@dataclass(frozen=True)
class Collective:
    """All executions of one kind of collective in a step, on one device."""

    kind: str
    beside: bool  # whether it overlaps with the rest
    devices: int  # number of devices in one group
    count: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class CompiledCost:
    """Seconds and FLOPs of one execution of the module on one device."""

    compute_s: float
    product_s: float  # part of compute_s in fusions with a matrix product
    kernel_s: float
    unpriced_s: float
    sync_s: float
    async_s: float
    host_s: float
    network_s: float
    schedule_s: float
    product_flops: float
    kernel_flops: float
    kernels: dict[str, int]  # number of calls by kernel
    unpriced_kernels: tuple[str, ...]
    collectives: tuple[Collective, ...]
    trips: dict[str, int]
    unknown_loops: tuple[str, ...]  # loops with unknown trip count

    @property
    def device_s(self) -> float:
        return self.compute_s + self.kernel_s + self.unpriced_s

    @property
    def bound_s(self) -> float:
        return max(self.device_s, self.sync_s + self.async_s, self.host_s, self.network_s)


@dataclass
class _Clock:
    """Simulated time: when each queue is free and each transfer arrives, in seconds from a computation's start."""

    now: float = 0.0
    links: float = 0.0
    host: float = 0.0
    network: float = 0.0
    flight: dict[str, float] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)

    def send(self, queue: str, seconds: float) -> float:
        """Put a transfer into a queue; returns its arrival time."""
        arrival = max(self.now, getattr(self, queue)) + seconds
        setattr(self, queue, arrival)
        return arrival

    def wait(self, name: str | None) -> None:
        self.now = max(self.now, self.flight.pop(name or "", 0.0))


def estimate(module: Module, chip: Chip, slices: int = 1, unknown: int = 1) -> CompiledCost:
    """Estimate the cost of one execution of a module on one device of a chip.

    Args:
        unknown: iterations of a loop whose number the module does not tell.
    """
    return _Estimate(module, chip, slices, unknown).cost()


class _Estimate:
    """Simulation of a module. `times` is the number of runs of a computation per step; with 0 nothing is recorded."""

    def __init__(self, module: Module, chip: Chip, slices: int, unknown: int = 1):
        self.module, self.chip, self.slices, self.unknown, self.work = module, chip, slices, unknown, Work(module)
        self.seconds: dict[str, float] = defaultdict(float)
        self.product_flops = self.kernel_flops = 0.0
        self.kernels: Counter[str] = Counter()
        self.unpriced_kernels: set[str] = set()
        self.collectives: dict[tuple[str, bool, int], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        self.trips: dict[str, int] = {}
        self.unknown_loops: set[str] = set()
        self.control: dict[str, Callable[[_Clock, Instruction, str, int], None]] = {
            "while": self._loop,
            "conditional": self._branch,
            "call": self._call,
        }

    def cost(self) -> CompiledCost:
        schedule_s, _ = self.walk(self.module.entry, 1)
        s = self.seconds
        return CompiledCost(
            compute_s=s["compute"], product_s=s["product"], kernel_s=s["kernel"], unpriced_s=s["unpriced"],
            sync_s=s["sync"], async_s=s["async"], host_s=s["host"], network_s=s["network"],
            schedule_s=schedule_s,
            product_flops=self.product_flops, kernel_flops=self.kernel_flops, kernels=dict(self.kernels),
            unpriced_kernels=tuple(sorted(self.unpriced_kernels)),
            collectives=tuple(
                Collective(kind, overlaps, devices, int(count), size, seconds)
                for (kind, overlaps, devices), (count, size, seconds) in sorted(self.collectives.items())
            ),
            trips=self.trips, unknown_loops=tuple(sorted(self.unknown_loops)),
        )  # fmt: skip

    def walk(self, computation: str, times: int, flight: dict[str, float] | None = None) -> tuple[float, dict]:
        """Simulate one execution of a computation; returns its seconds and the transfers that arrive later."""
        clock = _Clock(flight=dict(flight or {}))
        clock.begun = set(clock.flight)
        for instruction in self.module.computations[computation].values():
            run = self.control.get(instruction.op, self._one)
            run(clock, instruction, computation, times)
        return clock.now, {name: at - clock.now for name, at in clock.flight.items() if at > clock.now}

    def _loop(self, clock: _Clock, loop: Instruction, computation: str, times: int) -> None:
        turns = trip_count(self.module, computation, loop)
        if turns is None:
            self.unknown_loops.add(loop.name)
        turns = self.unknown if turns is None else turns
        if times:
            self.trips[loop.name] = turns
        body = loop.attribute("body") or ""
        _, left = self.walk(body, 0)  # an iteration starts with the unfinished transfers of the one before
        seconds, _ = self.walk(body, times * turns, left)
        clock.now += seconds * turns

    def _branch(self, clock: _Clock, choice: Instruction, computation: str, times: int) -> None:
        listed = re.search(r"branch_computations=\{([^}]*)\}", choice.attributes)
        two = (choice.attribute("true_computation"), choice.attribute("false_computation"))
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else [name for name in two if name]
        clock.now += self.walk(max(names, key=lambda name: self.walk(name, 0)[0]), times)[0]

    def _call(self, clock: _Clock, call: Instruction, computation: str, times: int) -> None:
        clock.now += self.walk(call.attribute("to_apply") or call.attribute("calls") or "", times)[0]

    def _one(self, clock: _Clock, i: Instruction, computation: str, times: int) -> None:
        called = i.attribute("calls") if i.op in ("fusion", "async-start") else None
        inside = self.work.inside(called) if called else None
        flops = inside.flops if inside else self.work.product_flops(i, computation)
        self.product_flops += flops * times
        if between := rendezvous(self.module, i, computation):
            self._between_slices(clock, i, between, times)
        elif i.op.endswith("-done"):
            clock.wait(self._started_by(i, computation))
        elif i.op.endswith("-update"):
            return
        elif kind := collective_kind(i.op):
            self._collective(clock, i, computation, times, kind)
        elif inside and inside.collectives and called and self._fused_collectives(clock, i, called, times):
            return
        elif i.cycles is not None:
            seconds = i.cycles / self.chip.clock
            self.seconds["compute"] += seconds * times
            self.seconds["product"] += seconds * times if flops else 0.0
            clock.now += seconds
        elif i.op == "custom-call":
            self._custom_call(clock, i, computation, times)
        elif i.op in COPIES:
            self._copy(clock, i, computation, times)
        else:
            self._without_figure(clock, i, computation, times, flops)

    def _book(self, clock: _Clock, bucket: str, seconds: float, times: int) -> None:
        self.seconds[bucket] += seconds * times
        clock.now += seconds

    def _transfer(self, i: Instruction, computation: str, kind: str, overlaps: bool, times: int) -> float:
        """Record one collective and return its seconds."""
        size, devices = payload(self.module, i, computation, kind), group_size(self.module, i)
        seconds = wire_seconds(kind, size, devices, self.chip.link_rate, self.chip.links)
        self.seconds["async" if overlaps else "sync"] += seconds * times
        if times:
            entry = self.collectives[kind, overlaps, devices]
            entry[:] = [entry[0] + times, entry[1] + size * times, entry[2] + seconds * times]
        return seconds

    def _collective(self, clock: _Clock, i: Instruction, computation: str, times: int, kind: str) -> None:
        overlaps = i.op.endswith("-start")
        arrival = clock.send("links", self._transfer(i, computation, kind, overlaps, times))
        if overlaps:
            clock.flight[i.name] = arrival
        else:
            clock.now = arrival

    def _fused_collectives(self, clock: _Clock, i: Instruction, called: str, times: int) -> bool:
        """Simulate the collectives inside a fusion or asynchronous wrapper; returns whether it has no other cost.

        A channel is one transfer, even if several fusions carry parts of it.
        """
        targets = {x.target for x in self.module.computations[called].values()}
        collectives = self.work.inside(called).collectives
        if "AsyncCollectiveDone" in targets:
            for collective, _ in collectives:
                clock.wait(_channel(collective))
            return True
        overlaps = i.op == "async-start" or "AsyncCollectiveStart" in targets or i.cycles is not None
        for collective, where in collectives:
            channel = _channel(collective)
            if channel in clock.begun:
                continue
            clock.begun |= {channel} if channel else set()
            kind = collective_kind(collective.op) or ""
            if kind == "all-reduce" and "all-reduce-scatter" in called:
                kind = "reduce-scatter"
            arrival = clock.send("links", self._transfer(collective, where, kind, overlaps, times))
            if overlaps:
                clock.flight[i.name if i.op == "async-start" else channel or i.name] = arrival
            else:
                clock.now = arrival
        return i.cycles is None

    def _between_slices(self, clock: _Clock, i: Instruction, name: str, times: int) -> None:
        """Simulate a transfer between slices, from its `send` to its `recv-done`."""
        if i.op == "send":
            seconds = i.bytes * RING["all-reduce"](self.slices) / self.chip.network
            self.seconds["network"] += seconds * times
            clock.flight[name] = clock.send("network", seconds)
        elif i.op == "recv-done":
            clock.wait(name)

    def _custom_call(self, clock: _Clock, i: Instruction, computation: str, times: int) -> None:
        if i.target == "tpu_custom_call":
            name, flops = re.sub(r"[.\d]+$", "", i.name), self.work.kernel_flops(i, computation)
            self.kernel_flops += flops * times
            self.kernels[name] += times
            self.unpriced_kernels |= set() if flops else {name}
            self._book(clock, "kernel", flops / (self.chip.peak * KERNEL_EFFICIENCY), times)
        elif i.target not in FREE_CALLS:
            self._book(clock, "unpriced", 2 * i.bytes / self.chip.hbm_rate, times)

    def _copy(self, clock: _Clock, i: Instruction, computation: str, times: int) -> None:
        moved = host_bytes(self.module, i, computation)
        if moved is not None:
            seconds = moved / HOST_RATE
            self.seconds["host"] += seconds * times
            clock.flight[i.name] = clock.send("host", seconds)

    def _without_figure(self, clock: _Clock, i: Instruction, computation: str, times: int, flops: float) -> None:
        small = i.bytes <= SMALL and not flops
        if i.op in FREE or small or (i.op == "fusion" and i.name.startswith("async-collective-done")):
            return
        near = [operand.bytes for operand in self.module.operands(i, computation)]
        if i.op == "dynamic-update-slice":  # in place: only the slice moves
            moved = 2 * near[1]
        elif i.op in ("dynamic-slice", "slice", "gather"):
            moved = 2 * i.bytes
        else:
            moved = 2 * self.work.rows_in_place(i) or i.bytes + sum(near)
        self._book(clock, "unpriced", max(moved / self.chip.hbm_rate, flops / self.chip.peak), times)

    def _started_by(self, done: Instruction, computation: str) -> str | None:
        """Name of the `-start` that a `-done` waits for, found through updates and tuples."""
        here = self.module.computations[computation]
        for name in done.operands:
            found = here.get(name)
            while found and (found.op in ("get-tuple-element", "bitcast") or found.op.endswith("-update")):
                found = here.get(found.operands[0])
            if found and found.op.endswith("-start"):
                return found.name
        return None


def _channel(collective: Instruction) -> str | None:
    return None if collective.channel is None else f"channel {collective.channel}"
