"""What a block of operations needs on one device: the most memory that lives at once, FLOPs, bytes moved, seconds.

A model of what a compiler makes of it. Products, kernels, gathers, reductions and loops write their results to memory;
everything else is elementwise or moves data, is fused into whoever reads it, and holds what it was made from alive instead.
What a loop gives back is kept for all its turns: that is where the activations saved for the backward pass are seen,
whatever the rematerialisation policy. What has the sizes of a parameter is whole or lies in parts as the parameter does:
the model says where it is gathered and where its gradient is summed and cut (lm/parallel/rules.py, `gathered`), by a
constraint, which is an operation here. What the turns of a loop would gather again from what does not change is gathered
once, before the loop, and kept for all its turns (of microbatches: the tables of the models, trained and frozen).

Rows are traced whole. Where a mesh splits their tokens, everything but the parameters is that much smaller.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lm.plan.chips import Chip
from lm.plan.kernels import KERNEL_EFFICIENCY, splash_flops
from lm.plan.trace import Op, TracedBlock, Value

WRITTEN = frozenset(
    ("dot_general", "conv_general_dilated", "pallas_call", "gather", "scatter", "scatter-add", "scatter_add", "sort",
     "top_k", "cumsum", "argmax", "argmin", "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
     "reduce_prod", "scan", "while", "cond", "random_bits", "threefry2x32", "custom_call")
)  # fmt: skip
COPIES = frozenset(("convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "copy"))
PRODUCT_EFFICIENCY = 0.92  # part of the peak that large matrix products reach


@dataclass
class Usage:
    """Of one device; bytes, FLOPs and seconds."""

    # What lives when most does, by kind; what came in is not in it. gathered: whole parameters; activations: saved by loops.
    peak: Counter[str] = field(default_factory=Counter)
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    moved: float = 0.0  # bytes read from and written to HBM
    hosted: float = 0.0  # bytes sent to and fetched from the host's memory
    gathered: float = 0.0  # bytes of parameters put together
    summed: float = 0.0  # bytes of whole gradients that are summed over devices and cut
    compute_s: float = 0.0  # products and kernels
    seconds: float = 0.0  # each operation at the slower of its two rates, one after another
    kernels: set[str] = field(default_factory=set)  # those whose FLOPs are not known
    # Of moved, gathered and seconds: what happens once, before all turns.
    before: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kept: float = 0.0  # bytes that were gathered before the loop
    turns: list[Usage] = field(default_factory=list)  # one turn of each loop, in their order
    ends_in_parts: tuple[bool, ...] = ()  # of each result, if it has the sizes of a parameter: whether it lies in parts

    def add(self, other: Usage, times: int) -> None:
        """Count what happens in `times` turns of a loop; the peak is the caller's."""
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
    """Usage of blocks on a chip.

    Args:
        parts: in how many parts parameters lie, see one_device.parts.
        vocab_size: by which logits are recognised.
        ways: into how many parts the tokens of a row are split.
    """

    chip: Chip
    parts: dict[tuple[int, ...], int]
    vocab_size: int
    ways: int = 1

    def usage(self, block: TracedBlock, parameters: set[Value]) -> Usage:
        """Of one run of a block, whose inputs `parameters` are parameters or cut from them."""
        return _Run(self, block, set(parameters), whole=set(), steady=set()).usage()

    def in_parts(self, block: TracedBlock) -> Usage:
        """Of a block that works on parameters as they lie, such as an optimizer's update: gradients come first."""
        run = _Run(self, block, set(), whole=set(), steady=set(), split=True)
        result = run.usage()
        ends = sum(self.share(value, value.bytes, whole=False) for value in (*block.inputs, *block.outputs))
        result.moved += ends
        result.seconds += ends / self.chip.hbm_rate
        return result

    def count(self, value: Value) -> int:
        """In how many parts a parameter, or what has its sizes, lies between uses."""
        return self.parts.get(tuple(sorted(value.shape)), 1)

    def is_parameter(self, value: Value) -> bool:
        """Whether it has the sizes of a parameter."""
        return tuple(sorted(value.shape)) in self.parts

    def share(self, value: Value, size: float, whole: bool) -> float:
        """What one device has of a value of this size; a parameter may be whole there or lie in parts."""
        if value.on_host:
            return 0.0
        if self.is_parameter(value):
            return size if whole else size / self.count(value)
        return size / self.ways


class _Run:
    """One pass over a block, in its order.

    Args:
        whole: those of its inputs with a parameter's sizes that do not lie in parts.
        steady: those of its inputs that are the same in every turn of a loop.
        split: nothing is whole.
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
        self.own = set(block.inputs)  # live outside, for the whole block
        self.whole = whole  # values with a parameter's sizes that do not lie in parts
        self.gathered: set[Value] = set()  # parameters that were put together here, and copies of them
        self.inside: dict[Op, Usage] = {}  # one turn of each loop
        # Value -> what must be in memory for it: itself if it is written there, else what it is made from.
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
        """Where each value that is in memory is needed last; and what is written, and from what the rest is made."""
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
        """Which results are made of parameters alone, and which of those with a parameter's sizes are whole."""
        if op.body is not None:
            self.inside[op] = inner = self._turn(op)
            ends = zip(op.outputs, inner.ends_in_parts, strict=True)
            self.whole |= {value for value, in_parts in ends if not in_parts}
            return
        of_parameters, of_gathered = (self._made_of(known, op) for known in (self.parameters, self.gathered))
        if of_gathered:  # and a constraint on what has been gathered is none
            self.gathered |= set(op.outputs)
            self.whole |= {value for value in op.outputs if self.of.is_parameter(value)}
        elif self._is_constraint(op):  # puts a parameter together, or a gradient into parts
            self.gathered |= set(op.outputs) if of_parameters else set()
            self.whole |= set(op.outputs) if of_parameters else set()
        elif of_parameters:
            self.parameters |= set(op.outputs)
        elif op.name in WRITTEN or any(value in self.whole for value in op.inputs):
            self.whole |= {value for value in op.outputs if self.of.is_parameter(value)}

    def _is_constraint(self, op: Op) -> bool:
        """Whether it puts a parameter together, or a gradient into parts."""
        known = self.gathered.issuperset(op.inputs)
        return op.name == "sharding_constraint" and self.of.count(op.outputs[0]) > 1 and not known

    def _crosses(self, op: Op) -> bool:
        """Whether it takes a value to the host's memory, or back."""
        return op.name == "device_put" and op.inputs[0].on_host != op.outputs[0].on_host

    def _held(self, value: Value) -> frozenset[Value]:
        """What lives for it in this block; nothing for constants and what came in."""
        return self.roots.get(value, frozenset()) - self.own

    def _made_of(self, known: set[Value], op: Op) -> bool:
        """Whether an operation reads nothing but known values; constants may join in."""
        read = [value for value in op.inputs if value in self.roots]
        return op.name not in WRITTEN and bool(read) and all(value in known for value in read)

    def _kind(self, op: Op, value: Value) -> str:
        if self.of.is_parameter(value):
            return "gathered" if value in self.gathered else "gradients"
        if self.of.vocab_size in value.shape:
            return "logits"
        return "activations" if op.body is not None and value in op.outputs[op.carry :] else "working"

    def _bytes(self, value: Value) -> float:
        """Bytes that a result takes."""
        return self.of.share(value, value.size * self._itemsize(value), self._is_whole(value))

    def _itemsize(self, value: Value) -> int:
        """Of a result as it is written: narrow where all that is read of it is a narrower copy."""
        readers = self.readers.get(value, [])
        if not readers or value in self.block.outputs or any(op.name not in COPIES for op in readers):
            return value.itemsize
        copies = (op.outputs[0] for op in readers)
        return min(value.itemsize, max(map(self._itemsize, copies)))

    def _is_whole(self, value: Value) -> bool:
        return not self.split and value in self.whole

    def _reused(self, op: Op, live: dict[Value, tuple[str, float]], ending: set[Value]) -> float:
        """Bytes of a loop's results that take the place of what the loop started from."""
        if op.body is None:
            return 0
        starts = op.inputs[op.constants : op.constants + op.carry]
        return sum(live[start][1] for start in starts if start in ending and start in live)

    def _turn(self, op: Op) -> Usage:
        """Usage of one turn of a loop."""
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
        """Bytes of each array that an operation reads; of a table, or of a stack of layers, only what it takes."""
        if op.name == "gather":
            yield from (min(value.bytes, op.outputs[0].bytes) / self.of.ways for value in op.inputs)
            return
        read = {root: value for value in op.inputs for root in self.roots.get(value, ())}
        for root, value in read.items():
            size = min(root.bytes, value.size * root.itemsize) if root in self.own else root.bytes
            yield self.of.share(root, size, self._is_whole(root))


def product_flops(op: Op) -> float:
    """FLOPs of a matrix product; 0 of anything else."""
    if op.name != "dot_general":
        return 0.0
    (contracted, _), _ = op.params["dimension_numbers"]
    return 2.0 * op.outputs[0].size * math.prod(op.inputs[0].shape[axis] for axis in contracted)


def kernel_flops(op: Op) -> float:
    """FLOPs of a kernel that lm/plan/kernels.py knows; 0 of anything else."""
    if op.name != "pallas_call":
        return 0.0
    arrays = [value.shape for value in op.inputs if value.is_float]
    # No kernel for dq is ever called where the backward kernel is fused, which is how this model calls it.
    return splash_flops(str(op.params["name"]), arrays, str(op.params.get("metadata")), fused_backward=True)
