"""Resource usage of a traced block on one device: peak memory, FLOPs, bytes moved, seconds.

It models the compiler. Products, kernels, gathers, reductions and loops write their results to memory. All other
operations are fused into their readers and keep their inputs alive instead of a result. A loop's stacked results live
for all its iterations, which is how activations saved for the backward pass are counted, for any rematerialisation
policy. An array with a parameter's sizes is either whole or sharded like the parameter: sharding constraints in the traced
model (lm/parallel/rules.py, `gathered`) tell where a parameter is gathered and where its gradient is summed and sharded.
Gathers in a loop of arrays that do not change between iterations are done once before the loop, and their results are
kept during it (for the loop over microbatches: the embedding tables of trained and frozen models).

Rows are traced whole. If the mesh splits their tokens, everything except parameters is divided by that number.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lm.plan.chips import Chip
from lm.plan.kernels import KERNEL_EFFICIENCY, splash_flops
from lm.plan.trace import Op, TracedBlock, Value

# Not here: updates of a part of an array (dynamic_update_slice, scatter), which happen in place.
WRITTEN = frozenset(
    ("dot_general", "conv_general_dilated", "pallas_call", "gather", "scatter-add", "scatter_add", "sort", "top_k", "cumsum", "argmax", "argmin", "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
     "reduce_prod", "scan", "while", "cond", "random_bits", "threefry2x32", "custom_call")
)  # fmt: skip
COPIES = frozenset(("convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "copy"))
PRODUCT_EFFICIENCY = 0.92  # fraction of the peak that large matrix products reach


@dataclass
class Usage:
    """Usage of one device, in bytes, FLOPs and seconds."""

    # Bytes by kind at peak, without the block's inputs. gathered: whole parameters; activations: saved by loops.
    peak: Counter[str] = field(default_factory=Counter)
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    moved: float = 0.0  # bytes read from and written to HBM
    hosted: float = 0.0  # bytes copied to and from the host's memory
    gathered: float = 0.0  # bytes of gathered parameters
    summed: float = 0.0  # bytes of whole gradients that are summed over devices and sharded
    compute_s: float = 0.0  # seconds of products and kernels
    seconds: float = 0.0  # operations one after another, each bound by compute or by memory
    kernels: set[str] = field(default_factory=set)  # names of kernels with unknown FLOPs
    # The part of `moved`, `gathered` and `seconds` that happens once before the loop instead of in every iteration.
    before: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kept: float = 0.0  # bytes gathered before the loop
    turns: list[Usage] = field(default_factory=list)  # usage of one iteration of each loop, in order
    ends_in_parts: tuple[bool, ...] = ()  # for each result, whether it is sharded like a parameter

    def add(self, other: Usage, times: int) -> None:
        """Add the usage of `times` iterations of a loop, except its peak, which the caller handles."""
        for name in (
            "product_flops",
            "kernel_flops",
            "moved",
            "hosted",
            "gathered",
            "summed",
            "compute_s",
            "seconds",
        ):
            setattr(self, name, getattr(self, name) + times * getattr(other, name) + other.before.get(name, 0))
        self.kernels |= other.kernels

    def raise_peak(self, kinds: Counter[str]) -> None:
        if kinds.total() > self.peak.total():
            self.peak = kinds


@dataclass(frozen=True)
class Analysis:
    """Analysis of blocks on a chip.

    Args:
        parts: number of shards by the sizes of a parameter, see `one_device.parts`.
        vocab_size: size by which logits are recognised.
        ways: number of devices that the tokens of a row are split over.
    """

    chip: Chip
    parts: dict[tuple[int, ...], int]
    vocab_size: int
    ways: int = 1

    def usage(self, block: TracedBlock, parameters: set[Value]) -> Usage:
        """Usage of one run of a block; `parameters` are the inputs that are parameters or slices of them."""
        return _Run(self, block, set(parameters), whole=set(), steady=set()).usage()

    def in_parts(self, block: TracedBlock) -> Usage:
        """Usage of a block that works on sharded parameters, such as an optimizer update."""
        run = _Run(self, block, set(), whole=set(), steady=set(), split=True)
        result = run.usage()
        ends = sum(self.share(value, value.bytes, whole=False) for value in (*block.inputs, *block.outputs))
        result.moved += ends
        result.seconds += ends / self.chip.hbm_rate
        return result

    def count(self, value: Value) -> int:
        """Number of shards of a value with a parameter's sizes; 1 for others."""
        return self.parts.get(tuple(sorted(value.shape)), 1)

    def is_parameter(self, value: Value) -> bool:
        """Whether a value has the sizes of a parameter."""
        return tuple(sorted(value.shape)) in self.parts

    def share(self, value: Value, size: float, whole: bool) -> float:
        """Bytes of a value of `size` bytes on one device; `whole`: a value with a parameter's sizes is not sharded."""
        if value.on_host:
            return 0.0
        if self.is_parameter(value):
            return size if whole else size / self.count(value)
        return size / self.ways


class _Run:
    """One pass over a block's operations in order.

    Args:
        parameters: inputs that are parameters or slices of them.
        whole: inputs with a parameter's sizes that are not sharded.
        steady: inputs that are the same in every iteration of a loop.
        split: whether everything is sharded.
    """

    def __init__(
        self,
        analysis: Analysis,
        block: TracedBlock,
        parameters: set[Value],
        whole: set[Value],
        steady: set[Value],
        split: bool = False,
    ):
        self.of, self.block, self.parameters, self.split = analysis, block, parameters, split
        self.steady = steady
        self.own = set(block.inputs)  # values that live during the whole block and are counted outside
        self.whole = whole  # values with a parameter's sizes that are not sharded
        self.gathered: set[Value] = set()  # gathered parameters and copies of them
        self.inside: dict[Op, Usage] = {}  # usage of one iteration of each loop
        # Value -> values that must be in memory for it: itself if it is written, else the inputs it is computed from.
        self.roots: dict[Value, frozenset[Value]] = {value: frozenset((value,)) for value in block.inputs}
        self.written: set[Op] = set()
        self.readers: dict[Value, list[Op]] = {}
        for op in block.ops:
            for value in op.inputs:
                self.readers.setdefault(value, []).append(op)
        self.result = Usage()

    def usage(self) -> Usage:
        last = self._last_uses()
        live: dict[Value, tuple[str, float]] = {}
        for place, op in enumerate(self.block.ops):
            if op not in self.written:
                continue
            inner = self.inside.get(op)
            ending = {root for value in op.inputs for root in self._held(value) if last.get(root) == place}
            made = {value: (self._kind(op, value), self._bytes(value)) for value in op.outputs if value not in self.own}
            now = Counter(inner.peak if inner else ())
            for kind, size in (*live.values(), *made.values()):
                now[kind] += int(size)
            now["gathered"] += int(inner.kept) if inner else 0
            now["working"] -= int(self._reused(op, live, ending))
            self.result.raise_peak(now)
            self._count(op, inner)
            for root in ending:
                live.pop(root, None)
            live |= {value: entry for value, entry in made.items() if last.get(value, -1) > place}
        return self.result

    def _last_uses(self) -> dict[Value, int]:
        """Index of the last operation that needs each value in memory; also fills `written` and `roots`."""
        last: dict[Value, int] = {}
        for place, op in enumerate(self.block.ops):
            self._follow_parameters(op)
            if op.body is None and self._made_of(self.steady, op):
                self.steady |= set(op.outputs)
                self.own |= set(op.outputs) if self._is_constraint(op) else set()
            held = frozenset(root for value in op.inputs for root in self.roots.get(value, ()))
            if op.name in WRITTEN or self._is_constraint(op) or self._crosses(op):
                self.written.add(op)
                last |= dict.fromkeys(held - self.own, place)
                self.roots |= {value: frozenset((value,)) for value in op.outputs}
            else:
                self.roots |= dict.fromkeys(op.outputs, held)
        for value in self.block.outputs:
            last |= dict.fromkeys(self._held(value), len(self.block.ops))
        self.result.ends_in_parts = tuple(value not in self.whole for value in self.block.outputs)
        return last

    def _follow_parameters(self, op: Op) -> None:
        """Update which values come from parameters only, and which values with a parameter's sizes are not sharded."""
        if op.body is not None:
            self.inside[op] = inner = self._turn(op)
            ends = zip(op.outputs, inner.ends_in_parts, strict=True)
            self.whole |= {value for value, in_parts in ends if not in_parts}
            return
        of_parameters, of_gathered = (self._made_of(known, op) for known in (self.parameters, self.gathered))
        if of_gathered:  # a constraint on a gathered value has no effect
            self.gathered |= set(op.outputs)
            self.whole |= {value for value in op.outputs if self.of.is_parameter(value)}
        elif self._is_constraint(op):  # gathers a parameter, or shards a gradient
            self.gathered |= set(op.outputs) if of_parameters else set()
            self.whole |= set(op.outputs) if of_parameters else set()
        elif of_parameters:
            self.parameters |= set(op.outputs)
        elif op.name in WRITTEN or any(value in self.whole for value in op.inputs):
            self.whole |= {value for value in op.outputs if self.of.is_parameter(value)}

    def _is_constraint(self, op: Op) -> bool:
        """Whether an operation is a sharding constraint that gathers a parameter or shards a gradient."""
        known = self.gathered.issuperset(op.inputs)
        return op.name == "sharding_constraint" and self.of.count(op.outputs[0]) > 1 and not known

    def _crosses(self, op: Op) -> bool:
        """Whether an operation copies a value to or from the host's memory."""
        return op.name == "device_put" and op.inputs[0].on_host != op.outputs[0].on_host

    def _held(self, value: Value) -> frozenset[Value]:
        """The values of this block that must be in memory for a value; none for constants and the block's inputs."""
        return self.roots.get(value, frozenset()) - self.own

    def _made_of(self, known: set[Value], op: Op) -> bool:
        """Whether an unwritten operation reads only known values and constants."""
        read = [value for value in op.inputs if value in self.roots]
        return op.name not in WRITTEN and bool(read) and all(value in known for value in read)

    def _kind(self, op: Op, value: Value) -> str:
        if self.of.is_parameter(value):
            return "gathered" if value in self.gathered else "gradients"
        if self.of.vocab_size in value.shape:
            return "logits"
        return "activations" if op.body is not None and value in op.outputs[op.carry :] else "working"

    def _bytes(self, value: Value) -> float:
        """Bytes of a result on this device."""
        return self.of.share(value, value.size * self._itemsize(value), self._is_whole(value))

    def _itemsize(self, value: Value) -> int:
        """Bytes per element of a result as written: narrower if all its readers are casts to a narrower dtype."""
        readers = self.readers.get(value, [])
        if not readers or value in self.block.outputs or any(op.name not in COPIES for op in readers):
            return value.itemsize
        copies = (op.outputs[0] for op in readers)
        return min(value.itemsize, max(map(self._itemsize, copies)))

    def _is_whole(self, value: Value) -> bool:
        return not self.split and value in self.whole

    def _reused(self, op: Op, live: dict[Value, tuple[str, float]], ending: set[Value]) -> float:
        """Bytes of a loop's results that reuse the memory of its initial carry."""
        if op.body is None:
            return 0
        starts = op.inputs[op.constants : op.constants + op.carry]
        return sum(live[start][1] for start in starts if start in ending and start in live)

    def _turn(self, op: Op) -> Usage:
        """Usage of one iteration of a loop."""
        assert op.body is not None
        pairs = list(zip(op.body.inputs, op.inputs, strict=True))
        inputs, whole = (
            {inside for inside, outside in pairs if outside in which} for which in (self.parameters, self.whole)
        )
        steady = set(op.body.inputs[: op.constants]) if op.name == "scan" else set()
        return _Run(self.of, op.body, inputs, whole, steady, self.split).usage()

    def _count(self, op: Op, inner: Usage | None) -> None:
        if inner is not None:
            self.result.add(inner, op.turns)
            self.result.turns.append(inner)
            return
        flops, kernel = product_flops(op), kernel_flops(op) / self.of.ways
        flops /= max(map(self.of.count, op.outputs)) if self.split else self.of.ways
        if op.name == "pallas_call" and not kernel:
            self.result.kernels.add(str(op.params.get("name")))
        moved = sum(self._read(op)) + sum(map(self._bytes, op.outputs))
        if self._is_constraint(op) and op.outputs[0] in self.own:
            self.result.kept += self._bytes(op.outputs[0])
            self.result.before["moved"] += moved
            self.result.before["gathered"] += op.outputs[0].bytes
            self.result.before["seconds"] += moved / self.of.chip.hbm_rate
            return
        peak = self.of.chip.peak
        busy = flops / (peak * PRODUCT_EFFICIENCY) + kernel / (peak * KERNEL_EFFICIENCY)
        self.result.product_flops += flops
        self.result.kernel_flops += kernel
        self.result.moved += moved
        if self._is_constraint(op):
            name = "gathered" if op.outputs[0] in self.gathered else "summed"
            setattr(self.result, name, getattr(self.result, name) + op.outputs[0].bytes)
        self.result.hosted += op.outputs[0].bytes / self.of.ways if self._crosses(op) else 0
        self.result.compute_s += busy
        self.result.seconds += max(busy, moved / self.of.chip.hbm_rate)

    def _read(self, op: Op) -> Iterator[float]:
        """Yield the bytes that an operation reads of each input; of a table or stack of layers, only the part it takes."""
        if op.name == "gather":
            yield from (min(value.bytes, op.outputs[0].bytes) / self.of.ways for value in op.inputs)
            return
        read = {root: value for value in op.inputs for root in self.roots.get(value, ())}
        for root, value in read.items():
            size = min(root.bytes, value.size * root.itemsize) if root in self.own else root.bytes
            yield self.of.share(root, size, self._is_whole(root))


def product_flops(op: Op) -> float:
    """FLOPs of a matrix product; 0 for other operations."""
    if op.name != "dot_general":
        return 0.0
    (contracted, _), _ = op.params["dimension_numbers"]
    return 2.0 * op.outputs[0].size * math.prod(op.inputs[0].shape[axis] for axis in contracted)


def kernel_flops(op: Op) -> float:
    """FLOPs of a kernel that lm/plan/kernels.py knows; 0 for other operations."""
    if op.name != "pallas_call":
        return 0.0
    arrays = [value.shape for value in op.inputs if value.is_float]
    # The model always calls the fused backward kernel, without a kernel for dq.
    return splash_flops(str(op.params["name"]), arrays, str(op.params.get("metadata")), fused_backward=True)
